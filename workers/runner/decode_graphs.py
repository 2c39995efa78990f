"""The decode step from the step's table to sampled tokens, one callable and one set of graphs per sampling plan.

A full graph holds everything: inputs, embedding, layers, attention, logits, sampling, and the write of each token
where the next step reads it, so that steps follow one another without the host. Graphs for greedy steps are part of the
capture plan. A step of another plan uses them for its logits and samples behind them, until an idle moment has captured
a graph of its own. Knows plans and descriptors; when there is time for a capture is decided above.

Shape suffixes: R = rows of the padded step, F = fields of the table, V = vocabulary.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch

from workers.graphs import BatchDescriptor, CUDAGraphMode, get_forward_context
from workers.graphs.wrapper import CUDAGraphWrapper
from workers.runner.decode_batch import DecodeBatch
from workers.sampling.logprobs import LogprobsTensors
from workers.sampling.plan import GREEDY_PLAN, SamplingPlan
from workers.sampling.sampler import Sampler, SamplerOutput

#: Sampling plans with graphs of their own, the greedy one included; the rest sample behind the greedy graph.
MAX_CAPTURED_PLANS = 8

#: ``(input_ids_R, positions_R)`` to logits ``[R, V]``.
LogitsFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
#: A step's table to logits and token ids.
DecodeFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class DecodeGraphs:
    """Runs decode steps.

    Args:
        logits: The model with its head.
        batch: Owner of the step's buffers.
        sampler: Samples.
        wrap: Puts captured graphs around a step.
    """

    def __init__(
        self,
        logits: LogitsFunction,
        batch: DecodeBatch,
        sampler: Sampler,
        wrap: Callable[[DecodeFunction], CUDAGraphWrapper],
    ) -> None:
        self._logits = logits
        self._batch = batch
        self._sampler = sampler
        self._wrap = wrap
        self._graphs = {GREEDY_PLAN: self._make_graphs(GREEDY_PLAN)}
        self._wanted: collections.Counter[tuple[SamplingPlan, BatchDescriptor]] = collections.Counter()

    def __call__(
        self, table_RF: torch.Tensor, plan: SamplingPlan, num_reqs: int
    ) -> tuple[torch.Tensor, LogprobsTensors | None]:
        """Run one step in the current forward context.

        Args:
            table_RF: The step's table, committed.
            plan: Of the step's rows.
            num_reqs: Real rows.

        Returns:
            The rows' token ids, int64 [num_reqs], valid until the next step, and their logprobs if the plan has any.
        """
        context = get_forward_context()
        if context.cudagraph_runtime_mode is not CUDAGraphMode.FULL:
            _, sampled = self._step(table_RF, plan)
            return sampled.token_ids_R[:num_reqs], sampled.logprobs
        assert context.batch_descriptor is not None
        graphs = self._graphs.get(plan)
        if plan == GREEDY_PLAN or (graphs is not None and graphs.has_graph(context.batch_descriptor)):
            _, token_ids_R = self._graphs[plan](table_RF)
            return token_ids_R[:num_reqs], None
        if plan.num_logprobs < 0:
            self._wanted[plan, context.batch_descriptor] += 1
        logits_RV, _ = self.greedy(table_RF)
        sampled = self._sample(logits_RV[:num_reqs], plan)
        return sampled.token_ids_R, sampled.logprobs

    def unpack_ahead(self, table_RF: torch.Tensor, mode: CUDAGraphMode) -> None:
        """Unpack a step's table that no full graph will unpack, before the step's forward context is made.

        An attention backend may read the buffers when it plans.
        """
        if mode is not CUDAGraphMode.FULL:
            self._batch.unpack(table_RF)

    def greedy(self, table_RF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The greedy step in the current forward context.

        Returns:
            Logits ``[R, V]`` and token ids, int64 ``[R]``, of all rows, valid until the next step.
        """
        logits_RV, token_ids_R = self._graphs[GREEDY_PLAN](table_RF)
        return logits_RV, token_ids_R

    def next_wanted(self) -> tuple[SamplingPlan, BatchDescriptor] | None:
        """The plan and size that steps asked for most often without having a graph, or None."""
        for (plan, descriptor), _ in self._wanted.most_common():
            if plan in self._graphs or len(self._graphs) < MAX_CAPTURED_PLANS:
                return plan, descriptor
        return None

    def capture(self, table_RF: torch.Tensor, plan: SamplingPlan) -> None:
        """Run a plan's own step in the current context: in mode NONE it warms up, in mode FULL it captures."""
        if plan not in self._graphs:
            self._graphs[plan] = self._make_graphs(plan)
        self._graphs[plan](table_RF)

    def settle(self, plan: SamplingPlan, descriptor: BatchDescriptor) -> None:
        """Nobody wants this graph any more: it is captured, or cannot be."""
        del self._wanted[plan, descriptor]

    def _make_graphs(self, plan: SamplingPlan) -> CUDAGraphWrapper:
        def decode_step(table_RF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits_RV, sampled = self._step(table_RF, plan)
            return logits_RV, sampled.token_ids_R

        return self._wrap(decode_step)

    def _step(self, table_RF: torch.Tensor, plan: SamplingPlan) -> tuple[torch.Tensor, SamplerOutput]:
        num_rows, buffers = len(table_RF), self._batch.buffers
        if get_forward_context().cudagraph_runtime_mode is CUDAGraphMode.FULL:
            self._batch.unpack(table_RF)
        logits_RV = self._logits(buffers.input_ids_R[:num_rows], buffers.positions_R[:num_rows])
        return logits_RV, self._sample(logits_RV, plan)

    def _sample(self, logits_RV: torch.Tensor, plan: SamplingPlan) -> SamplerOutput:
        """Sample the first rows of the step, and leave the tokens where the next step reads them."""
        num_rows, buffers = len(logits_RV), self._batch.buffers
        slots_R = buffers.slots_R[:num_rows]
        sampled = self._sampler.sample(logits_RV, slots_R, buffers.num_output_R[:num_rows], plan)
        # Padding rows share a slot that nobody reads.
        buffers.last_token_S.index_copy_(0, slots_R, sampled.token_ids_R)
        return sampled
