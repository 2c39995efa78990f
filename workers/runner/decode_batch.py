"""A pure decode step: one row per request, described by one small table.

The table travels to the device in one copy, and the first node of the decode graph makes everything else of it
(:mod:`workers.kernels.decode_inputs`). Block tables live on the device by slot; a step brings at most one new block
per row with it, and rows that miss more (a request's first decode) are brought up to date before. Knows requests and
numbers, not the model.

Shape suffixes: R = rows of the padded step, F = fields, M = most blocks of a request, S = slots.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from workers.attention.base import BatchGeometry
from workers.kernels.decode_buffers import DecodeBuffers, DecodeField
from workers.kernels.decode_inputs import unpack_decode
from workers.runner.buffers import HostDeviceBuffer
from workers.runner.input_batch import InputBatch
from workers.runner.slots import SlotTable
from workers.scheduler.output import SchedulerOutput

#: A padding row: its slot goes in front and its end of the query behind.
_PADDING_FIELDS = (-1, 0, 0, -1, 0)


@dataclasses.dataclass(slots=True)
class DecodeInputs:
    """One decode step, ready for :class:`workers.runner.decode_graphs.DecodeGraphs`.

    Attributes:
        table_RF: int32 on the device, see :class:`DecodeField`; R rows, padding included.
        geometry: For the attention backend.
        num_reqs: Real rows.
    """

    table_RF: torch.Tensor
    geometry: BatchGeometry
    num_reqs: int


class DecodeBatch:
    """Persistent inputs of decode steps.

    Args:
        slots: Of the engine; shared with the batch of other steps.
        batch: Of the other steps. Token ids and positions lie where its own do, since a piecewise graph serves both.

    Attributes:
        buffers: What the step's kernels read. ``last_token_S`` belongs to all steps: whoever samples writes it.
    """

    def __init__(self, slots: SlotTable, batch: InputBatch) -> None:
        max_num_seqs, max_blocks = slots.block_table_SM.shape
        device = batch.last_token_S.device
        self.block_size = batch.block_size
        self.buffers = DecodeBuffers.allocate(
            batch.input_ids.device[:max_num_seqs], batch.positions.device[:max_num_seqs], batch.last_token_S, max_blocks
        )
        self._slots = slots
        self._is_cuda = device.type == "cuda"
        self._table = HostDeviceBuffer(slots.max_num_seqs, len(DecodeField), dtype=torch.int32, device=device)
        self._upload_rows = HostDeviceBuffer(slots.max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._upload_slots = HostDeviceBuffer(slots.max_num_seqs, dtype=torch.int64, device=device)
        #: Columns of each slot's table that the device has.
        self._num_on_device = np.zeros(max_num_seqs, dtype=np.int64)
        self._ends_R = np.arange(1, max_num_seqs + 1, dtype=np.int32)

    def forget(self, slot: int) -> None:
        """The slot has a new request, whose blocks the device has not seen."""
        self._num_on_device[slot] = 0

    def prepare(self, output: SchedulerOutput, slots: list[int], num_rows: int) -> DecodeInputs:
        """Write the step's table and commit it.

        Args:
            output: A step in which every request computes one token and is sampled.
            slots: The slot of each scheduled request.
            num_rows: Rows of the padded batch.
        """
        scheduled, count = output.scheduled, len(slots)
        requests = [item.request for item in scheduled]
        slots_R = np.array(slots, dtype=np.int64)
        self._slots.update_blocks(requests, slots_R)
        self._upload_missing(slots_R)
        positions = [item.num_computed_tokens for item in scheduled]
        known = [request.token_ids for request in requests]
        table_RF = self._table.np[:count]
        table_RF[:, DecodeField.SLOT] = slots_R
        table_RF[:, DecodeField.POSITION] = positions
        table_RF[:, DecodeField.TOKEN] = [
            ids[position] if position < len(ids) else -1 for ids, position in zip(known, positions, strict=True)
        ]
        table_RF[:, DecodeField.NUM_OUTPUT] = [
            item.num_computed_tokens + 1 - item.request.num_prompt_tokens for item in scheduled
        ]
        self._add_blocks(table_RF, slots_R)
        table_RF[:, DecodeField.QUERY_END] = self._ends_R[:count]
        self._pad(count, num_rows)
        return self._commit(count, num_rows, self._table.np[:num_rows, DecodeField.POSITION] + 1)

    def prepare_dummy(self, num_rows: int) -> DecodeInputs:
        """A step of padding rows only: for warm-up and capture."""
        self._pad(0, num_rows)
        return self._commit(0, num_rows, np.zeros(num_rows, dtype=np.int32))

    def unpack(self, table_RF: torch.Tensor) -> None:
        """Fill the buffers from a committed table: on CUDA, part of a full graph or before the step; on a CPU, done."""
        if self._is_cuda:
            unpack_decode(table_RF, self.buffers, self.block_size)

    def _add_blocks(self, table_RF: npt.NDArray[np.int32], slots_R: npt.NDArray[np.int64]) -> None:
        """Have the step bring the block that a slot gained to the device."""
        table_RF[:, DecodeField.NEW_COLUMN] = -1
        known_R, num_blocks_R = self._num_on_device[slots_R], self._slots.num_blocks[slots_R]
        for row in np.flatnonzero(known_R < num_blocks_R).tolist():
            column = known_R[row]
            table_RF[row, DecodeField.NEW_COLUMN] = column
            table_RF[row, DecodeField.NEW_BLOCK] = self._slots.block_table_SM[slots_R[row], column]
        self._num_on_device[slots_R] = num_blocks_R

    def _upload_missing(self, slots_R: npt.NDArray[np.int64]) -> None:
        """Bring the tables of slots that lack more than the last block to the device."""
        num_blocks_S = self._slots.num_blocks
        missing = slots_R[num_blocks_S[slots_R] > self._num_on_device[slots_R] + 1]
        if not len(missing):
            return
        num_columns = int(num_blocks_S[missing].max())
        self._upload_rows.np[: len(missing), :num_columns] = self._slots.block_table_SM[missing, :num_columns]
        self._upload_slots.np[: len(missing)] = missing
        rows, index = self._upload_rows.commit(len(missing)), self._upload_slots.commit(len(missing))
        self.buffers.slot_tables_SM.index_copy_(0, index, rows)
        self._num_on_device[missing] = num_blocks_S[missing]

    def _pad(self, count: int, num_rows: int) -> None:
        self._table.np[count:num_rows] = (self._slots.padding_slot, *_PADDING_FIELDS, count, 0)

    def _commit(self, count: int, num_rows: int, seq_lens_cpu: npt.NDArray[np.int32]) -> DecodeInputs:
        query_start_loc = np.minimum(np.arange(num_rows + 1, dtype=np.int32), count).astype(np.int32)
        table_RF = self._table.commit(num_rows)
        b = self.buffers
        if not self._is_cuda:
            unpack_decode(table_RF, b, self.block_size)
        geometry = BatchGeometry(
            num_reqs=count,
            num_tokens=count,
            max_query_len=1,
            max_seq_len=int(seq_lens_cpu.max(initial=1)),
            query_start_loc_cpu=query_start_loc,
            seq_lens_cpu=seq_lens_cpu.astype(np.int32),
            query_start_loc=b.query_start_loc[: num_rows + 1],
            seq_lens=b.seq_lens_R[:num_rows],
            block_table_RM=b.block_table_RM[:num_rows],
            slot_mapping_T=b.slot_mapping_R[:num_rows],
        )
        return DecodeInputs(table_RF, geometry, count)
