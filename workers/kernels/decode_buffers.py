"""What a decode step is described by, and the tensors that its description becomes.

Shape suffixes: as in :mod:`workers.kernels.decode_inputs`.
"""

from __future__ import annotations

import dataclasses
import enum

import torch


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
