"""The model with captured graphs in front of it: which graph a batch takes, and capturing them.

Puts the parts of ``workers.graphs`` together for one model: resolution, dispatcher, wrappers, plan, budget. Knows
padded batches; nothing about requests or sampling.

Shape suffixes: T = tokens of the (padded) batch, E = model width, V = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from workers.attention.base import AttentionBackend
from workers.config import EngineConfig
from workers.graphs import (
    AttentionCGSupport,
    BatchDescriptor,
    BatchHistogram,
    CapturePlan,
    CUDAGraphMode,
    ForwardContext,
    GraphCounters,
    GraphDispatcher,
    GraphMemoryBudget,
    GraphReport,
    default_capture_sizes,
    make_report,
    resolve_mode_with_reason,
    set_forward_context,
)
from workers.graphs.backends.factory import make_graph_backend
from workers.graphs.capturer import GraphCapturer
from workers.graphs.resolve import ModeResolution
from workers.graphs.wrapper import CUDAGraphWrapper
from workers.model.decoder import DecoderForCausalLM
from workers.modes import CompilationMode
from workers.runner.input_batch import InputBatch, StepInputs
from workers.scheduler.output import SchedulerOutput

logger = logging.getLogger(__name__)

_NO_GRAPH = CUDAGraphMode.NONE


class GraphedModel:
    """Runs padded batches eagerly or through captured graphs.

    Args:
        config: The engine's configuration.
        model: The decoder.
        backend: Its attention.
        kv_caches: Per layer.
        batch: Owner of the persistent input buffers; dummy batches for captures come from it.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: DecoderForCausalLM,
        backend: AttentionBackend,
        kv_caches: Sequence[torch.Tensor],
        batch: InputBatch,
    ) -> None:
        self._model = model
        self._attn_backend = backend
        self._kv_caches = kv_caches
        self._batch = batch
        self._graph_backend = make_graph_backend(backend.device)
        self._resolution = _resolve(config, backend, self._graph_backend.freezes_context)
        compilation = config.compilation_config
        self._counters = GraphCounters()
        self._histogram = BatchHistogram()
        sizes: list[int] = []
        if self._resolution.mode is not _NO_GRAPH:
            sizes = default_capture_sizes(
                config.max_num_seqs,
                config.max_num_batched_tokens,
                sizes=compilation.cudagraph_capture_sizes,
                max_size=compilation.max_cudagraph_capture_size,
            )
        self._dispatcher = GraphDispatcher(
            self._resolution.mode,
            sizes,
            config.max_num_seqs,
            counters=self._counters,
            histogram=self._histogram,
        )
        self._plan = CapturePlan(
            self._dispatcher.capture_order(),
            config.max_num_seqs,
            first_sizes=compilation.cudagraph_first_sizes,
            histogram=self._histogram,
        )
        self._budget = GraphMemoryBudget(compilation.cudagraph_memory_limit_bytes)
        self._capturer = GraphCapturer(self._graph_backend, self._dispatcher, self._plan, self._budget, self._run_dummy)
        self._decode = self._wrap(self._decode_logits, "decode", compilation.debug_graph_inputs)
        self._forward = self._wrap(model, "model", compilation.debug_graph_inputs)

    def dispatch(self, output: SchedulerOutput) -> tuple[CUDAGraphMode, BatchDescriptor]:
        """The runtime mode and the padded size of a step."""
        uniform = 1 if output.num_tokens == output.num_reqs else None
        return self._dispatcher.dispatch(output.num_reqs, output.num_tokens, uniform)

    def run(
        self, inputs: StepInputs, mode: CUDAGraphMode, descriptor: BatchDescriptor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Run the model on a prepared batch.

        Returns:
            Hidden states ``[T, E]`` and logits ``[T, V]``: the first is None for a full graph of a pure decode, which
            ends in logits, the second is None for every other batch. Valid until the next call.
        """
        metadata = self._attn_backend.build_metadata(inputs.geometry)
        with set_forward_context(ForwardContext(self._attn_backend, metadata, self._kv_caches, mode, descriptor)):
            if mode is CUDAGraphMode.FULL and descriptor.uniform:
                return None, self._decode(inputs.input_ids_T, inputs.positions_T)
            return self._forward(inputs.input_ids_T, inputs.positions_T), None

    def capture_first_set(self) -> None:
        """Capture what serves every decode batch by padding; afterwards the engine is ready."""
        self._capturer.capture_first_set()
        if self._resolution.mode is not _NO_GRAPH:
            report = self.report()
            logger.info("graphs: %s, %d captured, %d pending", report.mode, len(report.captured), report.pending)

    def capture_next(self, idle: bool) -> bool:
        """Make one of the remaining captures, if ``idle``; returns whether there was one."""
        return self._capturer.capture_next(idle)

    def report(self) -> GraphReport:
        """What was captured, replayed and padded so far."""
        return make_report(
            self._resolution,
            self._dispatcher,
            self._counters,
            self._plan,
            self._budget,
            backend_name=self._graph_backend.name,
            bytes_held=self._graph_backend.bytes_held(),
        )

    def _wrap(self, function: Callable[..., torch.Tensor], name: str, debug_graph_inputs: bool) -> CUDAGraphWrapper:
        return CUDAGraphWrapper(
            function,
            CUDAGraphMode.FULL,
            self._graph_backend,
            name=name,
            debug_graph_inputs=debug_graph_inputs,
            counters=self._counters,
        )

    def _decode_logits(self, input_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        return self._model.compute_logits(self._model(input_ids_T, positions_T))

    def _run_dummy(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        num_reqs = descriptor.num_reqs or 1
        query_len = 1 if descriptor.uniform else 2
        self.run(self._batch.prepare_dummy(descriptor.num_tokens, num_reqs, query_len), mode, descriptor)


def _resolve(config: EngineConfig, backend: AttentionBackend, freezes_context: bool) -> ModeResolution:
    """The mode that runs. Only a mode that the user asked for is worth a warning when it cannot be had."""
    support = backend.cudagraph_support if freezes_context else AttentionCGSupport.ALWAYS
    requested = config.compilation_config.cudagraph_mode
    if config.enforce_eager:
        return ModeResolution(requested or _NO_GRAPH, _NO_GRAPH, "enforce_eager turns graphs off")
    is_default = requested is None
    if requested is None:
        on_cuda = backend.device.type == "cuda"
        requested = CUDAGraphMode.FULL_AND_PIECEWISE if on_cuda else _NO_GRAPH
    resolution = resolve_mode_with_reason(requested, CompilationMode.NONE, support, attention_is_split=False)
    if resolution.reason is not None:
        logger.log(logging.INFO if is_default else logging.WARNING, "%s", resolution.reason)
    return resolution
