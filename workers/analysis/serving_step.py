"""A decode step as an engine serves it, on the harness' model: from the step's table to sampled tokens in one graph.

Where the other forms of a verification lay a batch out by themselves, here the runner's own parts do it: the table, the
kernel that unpacks it, logits, the greedy sampler, and the write of each token where the next step reads it. Knows the
runner's parts; what counts as wrong is decided in :mod:`workers.analysis.verify`.

Shape suffixes: R = rows of the padded step, M = most blocks of a request, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.analysis.harness import Batch, Forward, ModelHarness
from workers.graphs import BatchDescriptor, CUDAGraphMode, CUDAGraphWrapper
from workers.request import Request, token_array
from workers.runner.decode_batch import DecodeBatch, DecodeInputs
from workers.runner.decode_graphs import DecodeFunction, DecodeGraphs
from workers.runner.input_batch import InputBatch
from workers.runner.slots import SlotTable
from workers.sampling.sampler import Sampler
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.scheduler.output import ScheduledRequest, SchedulerOutput

_FULL, _NONE = CUDAGraphMode.FULL, CUDAGraphMode.NONE


class ServingStep:
    """See the module.

    Args:
        harness: Of the model.
        forward: The model as it serves.
        wrap: Puts captured graphs around a step.
    """

    def __init__(
        self, harness: ModelHarness, forward: Forward, wrap: Callable[[DecodeFunction], CUDAGraphWrapper]
    ) -> None:
        config, device = harness.config, harness.device
        self._harness = harness
        self._slots = SlotTable(config.max_num_seqs, harness.blocks_per_seq)
        batch = InputBatch(
            self._slots, max(config.max_num_batched_tokens, config.max_num_seqs), config.block_size, device
        )
        self._inputs = DecodeBatch(self._slots, batch)
        sampler = Sampler(SamplingState(config.max_num_seqs, harness.model.config.vocab_size, device))
        self._graphs = DecodeGraphs(harness.decode_logits(forward), self._inputs, sampler, wrap)
        self._seated: list[Request] = []
        self._num_steps = 0

    @torch.inference_mode()
    def capture(self, descriptor: BatchDescriptor) -> None:
        """Warm up and capture on padding rows, as the runner does.

        Raises:
            Exception: Whatever the capture raises.
        """
        with self._harness.graph_backend.capturing(clean_up=False):
            for mode in (_NONE, _FULL):
                inputs = self._inputs.prepare_dummy(descriptor.num_tokens)
                self._run(inputs, mode, descriptor, is_capture=mode is _FULL)

    @torch.inference_mode()
    def run(self, batch: Batch, descriptor: BatchDescriptor, *, is_poisoned: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Replay the step for the requests of a decode batch.

        Args:
            batch: One token per request; its rows are given to the runner as requests of their own.
            is_poisoned: What no request owns of the slots' tables holds a stranger's block.

        Returns:
            Logits ``[R, V]`` and token ids, int64 ``[R]``.
        """
        output, slots = self._seat(batch)
        if is_poisoned:
            self._poison(batch)
        inputs = self._inputs.prepare(output, slots, descriptor.num_tokens)
        return self._run(inputs, _FULL, descriptor)

    def wrong_input(self, batch: Batch) -> str | None:
        """Name of the first input that the last step gave the model otherwise than the batch has it, if any."""
        buffers, geometry, num = self._inputs.buffers, batch.geometry, batch.num_tokens
        lengths = geometry.seq_lens_cpu[:num]
        columns = torch.arange(geometry.block_table_RM.shape[1], device=self._harness.device)
        owned_RM = columns < -(-geometry.seq_lens[:num, None] // self._harness.config.block_size)
        pairs = {
            "token ids": (buffers.input_ids_R[:num], batch.input_ids_T[:num]),
            "positions": (buffers.positions_R[:num], batch.positions_T[:num]),
            "sequence lengths": (buffers.seq_lens_R[:num], geometry.seq_lens[: len(lengths)]),
            "slot mapping": (buffers.slot_mapping_R[:num], geometry.slot_mapping_T[:num]),
            "block tables": (
                buffers.block_table_RM[:num, : len(columns)] * owned_RM, geometry.block_table_RM[:num] * owned_RM,
            ),
        }  # fmt: skip
        return next((name for name, (got, expected) in pairs.items() if not torch.equal(got, expected)), None)

    def _run(
        self, inputs: DecodeInputs, mode: CUDAGraphMode, descriptor: BatchDescriptor, *, is_capture: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._graphs.unpack_ahead(inputs.table_RF, mode)
        with self._harness.context(inputs.geometry, mode, descriptor, is_capture=is_capture):
            return self._graphs.greedy(inputs.table_RF)

    def _seat(self, batch: Batch) -> tuple[SchedulerOutput, list[int]]:
        """Make every row a request that is new to its slot."""
        self._slots.drop([request.request_id for request in self._seated])
        self._num_steps += 1
        tables, ids = batch.geometry.block_table_RM.tolist(), batch.input_ids_T.tolist()
        self._seated = []
        for row, length in enumerate(batch.geometry.seq_lens_cpu[: batch.num_tokens].tolist()):
            name, token_ids = f"{self._num_steps}/{row}", token_array([0] * (length - 1) + [ids[row]])
            request = Request(name, token_ids, length, SamplingParams(temperature=0.0), 1)
            request.block_ids = tables[row][: -(-length // self._harness.config.block_size)]
            self._seated.append(request)
        slots = [self._slots.seat(request)[0] for request in self._seated]
        for slot in slots:
            self._inputs.forget(slot)
        scheduled = [ScheduledRequest(request, request.num_tokens - 1, 1, True) for request in self._seated]
        return SchedulerOutput(self._num_steps, scheduled, len(scheduled)), slots

    def _poison(self, batch: Batch) -> None:
        """Every entry of the slots' tables that the step does not write itself is a stranger's block."""
        used, buffers = set(batch.used_blocks), self._inputs.buffers
        buffers.slot_tables_SM.fill_(next(block for block in range(self._harness.num_blocks) if block not in used))
        buffers.last_token_S.fill_(self._harness.model.config.vocab_size - 1)
