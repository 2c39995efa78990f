"""From one small table to everything a decode step reads, on the device.

The host describes a pure decode step by a few numbers per row; this turns them into token ids, positions, lengths, slot
mapping and block tables, in buffers whose addresses never move. On CUDA it is one kernel and the first node of a decode
graph, so that a step costs the host one copy and one launch. Knows buffers and numbers; nothing about requests.

Shape suffixes: R = rows of the (padded) step, F = fields of the table, S = slots and one for padding rows, M = most
blocks of a request.
"""

from __future__ import annotations

import dataclasses
import enum

import torch

#: ``slot_mapping`` of a padding row.
_PADDING = -1


class DecodeField(enum.IntEnum):
    """Columns of a step's table, int32. Filled by the runner, read by :func:`unpack_decode`."""

    SLOT = 0
    """Slot of the row's request; the padding slot (the last one) in padding rows."""
    POSITION = 1
    """Position of the token to compute, or -1 in a padding row."""
    TOKEN = 2
    """The token, or -1 where only the device knows it: the last one sampled in the slot."""
    NUM_OUTPUT = 3
    """Index in the request's output of the token that the step samples."""
    NEW_COLUMN = 4
    """Column of the slot's block table that the step adds, or -1."""
    NEW_BLOCK = 5
    """Block to write there."""
    QUERY_END = 6
    """End of the row's tokens in the batch: what ``query_start_loc`` holds behind it."""
    UNUSED = 7


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """Persistent tensors of decode steps, made for the largest batch; a step uses the first R rows.

    Attributes:
        input_ids_R: int64.
        positions_R: int64.
        slot_mapping_R: int64.
        seq_lens_R: int32.
        query_start_loc: int32 [R + 1]; the first element stays 0.
        block_table_RM: int32, a copy of the slots' rows.
        slots_R: int64.
        num_output_R: int64.
        slot_tables_SM: int32, every slot's block table.
        last_token_S: int64, the last token sampled in every slot.
    """

    input_ids_R: torch.Tensor
    positions_R: torch.Tensor
    slot_mapping_R: torch.Tensor
    seq_lens_R: torch.Tensor
    query_start_loc: torch.Tensor
    block_table_RM: torch.Tensor
    slots_R: torch.Tensor
    num_output_R: torch.Tensor
    slot_tables_SM: torch.Tensor
    last_token_S: torch.Tensor

    @classmethod
    def allocate(
        cls,
        input_ids_R: torch.Tensor,
        positions_R: torch.Tensor,
        last_token_S: torch.Tensor,
        max_blocks_per_seq: int,
    ) -> DecodeBuffers:
        """Buffers around those that other steps use too."""
        max_num_seqs, device = len(input_ids_R), input_ids_R.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            input_ids_R=input_ids_R,
            positions_R=positions_R,
            slot_mapping_R=zeros(max_num_seqs),
            seq_lens_R=zeros(max_num_seqs, dtype=torch.int32),
            query_start_loc=zeros(max_num_seqs + 1, dtype=torch.int32),
            block_table_RM=zeros(max_num_seqs, max_blocks_per_seq, dtype=torch.int32),
            slots_R=zeros(max_num_seqs),
            num_output_R=zeros(max_num_seqs),
            slot_tables_SM=zeros(len(last_token_S), max_blocks_per_seq, dtype=torch.int32),
            last_token_S=last_token_S,
        )


def unpack_decode(table_RF: torch.Tensor, buffers: DecodeBuffers, block_size: int) -> None:
    """Write the first R rows of every buffer from the step's table; see :class:`DecodeField`.

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
