# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""``unpack_decode`` as one kernel, a program per row.

Needs triton, so only :mod:`workers.kernels.decode_inputs` imports it, once there is a CUDA tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from workers.kernels.decode_buffers import DecodeBuffers, DecodeField

_NUM_FIELDS = len(DecodeField)
#: Block-table entries that a program copies at a time.
_TILE = 256


@triton.jit(do_not_specialize=["table_stride"])
def _unpack_kernel(
    step_ptr,
    input_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    seq_lens_ptr,
    query_start_ptr,
    block_table_ptr,
    slots_ptr,
    num_output_ptr,
    slot_tables_ptr,
    last_token_ptr,
    table_stride,
    PAGE: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    fields = step_ptr + row * NUM_FIELDS
    slot = tl.load(fields)
    position = tl.load(fields + 1)
    token = tl.load(fields + 2)
    column = tl.load(fields + 4)
    block = tl.load(fields + 5)
    tl.store(slots_ptr + row, slot.to(tl.int64))
    tl.store(num_output_ptr + row, tl.load(fields + 3).to(tl.int64))
    tl.store(query_start_ptr + row + 1, tl.load(fields + 6))
    tl.store(seq_lens_ptr + row, position + 1)
    tl.store(positions_ptr + row, tl.maximum(position, 0).to(tl.int64))
    last_token = tl.load(last_token_ptr + slot)
    tl.store(input_ids_ptr + row, tl.where(token >= 0, token.to(tl.int64), last_token))

    source = slot_tables_ptr + slot.to(tl.int64) * table_stride
    target = block_table_ptr + row.to(tl.int64) * table_stride
    tl.store(source + column, block, mask=column >= 0)
    # Reads below may come before that store is seen, so the new block is put in by hand.
    own_column = tl.maximum(position, 0) // PAGE
    own_block = tl.where(own_column == column, block, tl.load(source + own_column))
    slot_mapping = own_block.to(tl.int64) * PAGE + tl.maximum(position, 0) % PAGE
    tl.store(slot_mapping_ptr + row, tl.where(position >= 0, slot_mapping, -1))
    # Columns beyond the row's own are never read.
    for first in range(0, own_column + 1, TILE):
        columns = first + tl.arange(0, TILE)
        inside = columns <= own_column
        blocks = tl.load(source + columns, mask=inside, other=0)
        tl.store(target + columns, tl.where(columns == column, block, blocks), mask=inside)


def unpack(table_RF: torch.Tensor, buffers: DecodeBuffers, block_size: int) -> None:
    """See :func:`workers.kernels.decode_inputs.unpack_decode`."""
    b = buffers
    assert table_RF.shape[1] == _NUM_FIELDS
    assert table_RF.is_contiguous()
    assert b.block_table_RM.stride(0) == b.slot_tables_SM.stride(0)
    _unpack_kernel[(len(table_RF),)](
        table_RF, b.input_ids_R, b.positions_R, b.slot_mapping_R, b.seq_lens_R, b.query_start_loc, b.block_table_RM,
        b.slots_R, b.num_output_R, b.slot_tables_SM, b.last_token_S, b.block_table_RM.stride(0),
        PAGE=block_size, NUM_FIELDS=_NUM_FIELDS, TILE=_TILE, num_warps=1,
    )  # fmt: skip
