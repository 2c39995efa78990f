"""From one small table to everything a decode step reads, on the device.

The host describes a pure decode step by a few numbers per row; this turns them into token ids, positions, lengths, slot
mapping and block tables, in buffers whose addresses never move. On CUDA it is one kernel and the first node of a decode
graph, so that a step costs the host one copy and one launch. Knows buffers and numbers; nothing about requests.

Shape suffixes: R = rows of the (padded) step, F = fields of the table, S = slots and one for padding rows, M = most
blocks of a request.
"""

from __future__ import annotations

import torch

from workers.kernels.decode_buffers import DecodeBuffers

#: ``slot_mapping`` of a padding row.
_PADDING = -1


def unpack_decode(table_RF: torch.Tensor, buffers: DecodeBuffers, block_size: int) -> None:
    """Write the first R rows of every buffer from the step's table.

    See :class:`workers.kernels.decode_buffers.DecodeField` for the table.

    Args:
        table_RF: int32, on the buffers' device.
        buffers: ``slot_tables_SM`` gains the new blocks; ``last_token_S`` is read.
        block_size: Tokens per KV block.
    """
    if table_RF.is_cuda:
        from workers.kernels.decode_inputs_triton import unpack

        unpack(table_RF, buffers, block_size)
    else:
        unpack_with_torch(table_RF, buffers, block_size)


def unpack_with_torch(table_RF: torch.Tensor, buffers: DecodeBuffers, block_size: int) -> None:
    """:func:`unpack_decode` in plain torch: what the kernel is compared with, and the CPU's way."""
    num_rows = len(table_RF)
    slot, position, token, num_output, column, block, query_end, _ = table_RF.long().unbind(1)
    is_new = (column >= 0).nonzero().squeeze(1)
    buffers.slot_tables_SM[slot[is_new], column[is_new]] = block[is_new].int()
    tables_RM = buffers.slot_tables_SM.index_select(0, slot)
    is_padding = position < 0
    positions = position.clamp(min=0)
    last_token = buffers.last_token_S.index_select(0, slot)
    blocks = tables_RM.gather(1, (positions // block_size)[:, None]).squeeze(1).long()
    slot_mapping = blocks * block_size + positions % block_size
    buffers.input_ids_R[:num_rows] = torch.where(token >= 0, token, last_token)
    buffers.positions_R[:num_rows] = positions
    buffers.slot_mapping_R[:num_rows] = slot_mapping.masked_fill(is_padding, _PADDING)
    buffers.seq_lens_R[:num_rows] = position + 1
    buffers.query_start_loc[1 : num_rows + 1] = query_end
    buffers.block_table_RM[:num_rows] = tables_RM
    buffers.slots_R[:num_rows] = slot
    buffers.num_output_R[:num_rows] = num_output
