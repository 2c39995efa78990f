"""A step of any kind in persistent buffers, laid out by the host: prefills, chunks, and decodes among them.

Turns the scheduler's decision into token ids, positions, slot mapping and block tables. Steps of decodes alone have a
shorter way (:mod:`workers.runner.decode_batch`). Knows requests and numbers, not the model. A *row* is a request's
place in one step; slots are :mod:`workers.runner.slots`'.

Shape suffixes: T = tokens of the step, R = requests of the step, M = most blocks of a request.
"""

from __future__ import annotations

import dataclasses
from array import array

import numpy as np
import numpy.typing as npt
import torch

from workers.attention.base import PADDING_SLOT, BatchGeometry
from workers.request import Request
from workers.runner.buffers import HostDeviceBuffer
from workers.runner.slots import SlotTable
from workers.scheduler.output import SchedulerOutput


@dataclasses.dataclass(slots=True)
class StepInputs:
    """One step, ready for the model: views of the persistent buffers, as long as the padded batch.

    Attributes:
        geometry: For the attention backend.
        input_ids_T: int64 tokens.
        positions_T: int64 positions.
    """

    geometry: BatchGeometry
    input_ids_T: torch.Tensor
    positions_T: torch.Tensor


@dataclasses.dataclass(slots=True)
class SampledRows:
    """The requests of a step that are sampled, in row order, ready for the sampler.

    Attributes:
        requests: Themselves.
        slots: Their slots, on the host.
        slots_R: Their slots, int64, on the device.
        num_output_R: int64, index of the output token each of them gets.
        rows_R: int64, which requests of the step they are; None if they are all of them.
    """

    requests: list[Request]
    slots: list[int]
    slots_R: torch.Tensor
    num_output_R: torch.Tensor
    rows_R: torch.Tensor | None


class InputBatch:
    """Persistent input buffers of one engine.

    Args:
        slots: Of the engine.
        max_num_tokens: Most tokens in a step.
        block_size: Tokens per KV block.
        device: Where the buffers live.

    Attributes:
        input_ids: int64 tokens.
        positions: int64 positions.
        last_token_S: int64, the last token sampled in each slot, and one for padding rows: feeds a step where the
            host does not know it yet.
    """

    def __init__(
        self,
        slots: SlotTable,
        max_num_tokens: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self._slot_table = slots
        self._block_table = slots.block_table_SM
        max_num_seqs, max_blocks_per_seq = slots.block_table_SM.shape
        max_num_tokens = max(max_num_tokens, max_num_seqs)

        def tokens(dtype: torch.dtype) -> HostDeviceBuffer:
            return HostDeviceBuffer(max_num_tokens, dtype=dtype, device=device)

        def rows(dtype: torch.dtype, extra: int = 0) -> HostDeviceBuffer:
            return HostDeviceBuffer(max_num_seqs + extra, dtype=dtype, device=device)

        self.input_ids = tokens(torch.int64)
        self.positions = tokens(torch.int64)
        self._slot_mapping = tokens(torch.int64)
        self._query_start_loc = rows(torch.int32, extra=1)
        self._seq_lens = rows(torch.int32)
        self._sampled_slots = rows(torch.int64)
        self._num_output = rows(torch.int64)
        self._sampled_rows = rows(torch.int64)
        self._from_device = rows(torch.bool)
        self._decode_slots = rows(torch.int64)
        self._tables = HostDeviceBuffer(max_num_seqs, max_blocks_per_seq, dtype=torch.int32, device=device)
        self.last_token_S = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)

    def prepare(self, output: SchedulerOutput, slots: list[int], num_tokens: int, num_reqs: int) -> StepInputs:
        """Write what the model reads and commit it to the device.

        Args:
            output: The scheduler's decision.
            slots: The slot of each scheduled request.
            num_tokens: Tokens of the padded batch.
            num_reqs: Requests of the padded batch. Padding rows have length 0 and write to no cache slot.
        """
        scheduled = output.scheduled
        starts = np.array([s.num_computed_tokens for s in scheduled], dtype=np.int64)
        lens = np.array([s.num_tokens for s in scheduled], dtype=np.int64)
        slots_np = np.array(slots, dtype=np.int64)
        self._slot_table.update_blocks([item.request for item in scheduled], slots_np)
        input_ids_T = self._commit_input_ids(output, slots, num_tokens)
        positions_T, slot_mapping_T = self._commit_positions(output.num_tokens, num_tokens, starts, lens, slots_np)
        geometry = self._geometry(output, num_reqs, starts, lens, slots_np, slot_mapping_T)
        return StepInputs(geometry, input_ids_T, positions_T)

    def prepare_sampling(self, output: SchedulerOutput, slots: list[int]) -> SampledRows:
        """Write what the sampler reads of a prepared step and commit it; the model does not wait for this.

        Args:
            output: The scheduler's decision.
            slots: The slot of each scheduled request.
        """
        rows = [row for row, item in enumerate(output.scheduled) if item.samples]
        sampled = [output.scheduled[row] for row in rows]
        sampled_slots = [slots[row] for row in rows]
        count = len(rows)
        self._sampled_slots.np[:count] = sampled_slots
        self._num_output.np[:count] = [
            item.num_computed_tokens + item.num_tokens - item.request.num_prompt_tokens for item in sampled
        ]
        rows_R = None
        if count != output.num_reqs:
            self._sampled_rows.np[:count] = rows
            rows_R = self._sampled_rows.commit(count)
        return SampledRows(
            requests=[item.request for item in sampled],
            slots=sampled_slots,
            slots_R=self._sampled_slots.commit(count),
            num_output_R=self._num_output.commit(count),
            rows_R=rows_R,
        )

    def prepare_dummy(self, num_tokens: int, num_reqs: int, max_query_len: int) -> StepInputs:
        """A batch of padding rows only, at the addresses of real ones: for warm-up and capture."""
        self.input_ids.np[:num_tokens] = 0
        self.positions.np[:num_tokens] = 0
        self._slot_mapping.np[:num_tokens] = PADDING_SLOT
        self._query_start_loc.np[: num_reqs + 1] = 0
        self._seq_lens.np[:num_reqs] = 0
        geometry = BatchGeometry(
            num_reqs=0,
            num_tokens=0,
            max_query_len=max_query_len,
            max_seq_len=max_query_len,
            query_start_loc_cpu=self._query_start_loc.np[: num_reqs + 1].copy(),
            seq_lens_cpu=self._seq_lens.np[:num_reqs].copy(),
            query_start_loc=self._query_start_loc.commit(num_reqs + 1),
            seq_lens=self._seq_lens.commit(num_reqs),
            block_table_RM=self._tables.device[:num_reqs],
            slot_mapping_T=self._slot_mapping.commit(num_tokens),
        )
        return StepInputs(geometry, self.input_ids.commit(num_tokens), self.positions.commit(num_tokens))

    def _commit_input_ids(self, output: SchedulerOutput, slots: list[int], padded: int) -> torch.Tensor:
        """Tokens the host knows come from the request; a token still being sampled is read on the device."""
        ids = array("I")
        from_device: list[int] = []
        for row, item in enumerate(output.scheduled):
            start = item.num_computed_tokens
            known = item.request.token_ids
            if start >= len(known):
                assert item.num_tokens == 1, "only the last token of a decode can be unknown to the host"
                from_device.append(row)
                ids.append(0)
            else:
                ids += known[start : start + item.num_tokens]
        self.input_ids.np[: len(ids)] = np.frombuffer(ids, np.uint32)
        self.input_ids.np[len(ids) : padded] = 0
        input_ids_T = self.input_ids.commit(padded)
        if from_device:
            # Decodes come first and bring one token each, so row and token index agree.
            num_rows = from_device[-1] + 1
            mask = self._from_device.np
            mask[:num_rows] = False
            mask[from_device] = True
            self._decode_slots.np[:num_rows] = slots[:num_rows]
            previous = self.last_token_S[self._decode_slots.commit(num_rows)]
            head = input_ids_T[:num_rows]
            head.copy_(torch.where(self._from_device.commit(num_rows), previous, head))
        return input_ids_T

    def _commit_positions(
        self,
        num_tokens: int,
        padded: int,
        starts: npt.NDArray[np.int64],
        lens: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first_row = np.cumsum(lens) - lens
        positions = np.repeat(starts - first_row, lens) + np.arange(num_tokens)
        columns = positions // self.block_size
        # Into the flat table, which is five times as fast as with two indices.
        blocks = self._block_table.take(np.repeat(slots * self._block_table.shape[1], lens) + columns)
        self.positions.np[:num_tokens] = positions
        self._slot_mapping.np[:num_tokens] = (blocks - columns) * self.block_size + positions
        self.positions.np[num_tokens:padded] = 0
        self._slot_mapping.np[num_tokens:padded] = PADDING_SLOT
        return self.positions.commit(padded), self._slot_mapping.commit(padded)

    def _geometry(
        self,
        output: SchedulerOutput,
        padded: int,
        starts: npt.NDArray[np.int64],
        lens: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        slot_mapping_T: torch.Tensor,
    ) -> BatchGeometry:
        num_reqs = output.num_reqs
        query_start_loc = np.zeros(padded + 1, dtype=np.int32)
        np.cumsum(lens, out=query_start_loc[1 : num_reqs + 1])
        query_start_loc[num_reqs + 1 :] = output.num_tokens
        seq_lens = np.zeros(padded, dtype=np.int32)
        seq_lens[:num_reqs] = starts + lens
        max_seq_len = int(seq_lens.max())
        num_columns = -(-max_seq_len // self.block_size)
        self._query_start_loc.np[: padded + 1] = query_start_loc
        self._seq_lens.np[:padded] = seq_lens
        self._tables.np[:num_reqs, :num_columns] = self._block_table[slots, :num_columns]
        return BatchGeometry(
            num_reqs=num_reqs,
            num_tokens=output.num_tokens,
            max_query_len=int(lens.max()),
            max_seq_len=max_seq_len,
            query_start_loc_cpu=query_start_loc,
            seq_lens_cpu=seq_lens,
            query_start_loc=self._query_start_loc.commit(padded + 1),
            seq_lens=self._seq_lens.commit(padded),
            block_table_RM=self._tables.commit(padded),
            slot_mapping_T=slot_mapping_T,
        )
