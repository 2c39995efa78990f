"""The compiled model with captured graphs in front of it: which graph a batch takes, and capturing them.

Puts the parts of ``workers.compile`` and ``workers.graphs`` together for one model: compilation, resolution,
dispatcher, wrappers, plan, budget. Knows padded batches; nothing about requests or sampling.

Shape suffixes: T = tokens of the (padded) batch, E = model width, V = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from workers.artifacts.key import BundleKey
from workers.artifacts.library import ArtifactLibrary
from workers.attention.base import AttentionBackend, BatchGeometry
from workers.compile.compilation import BuildFlight
from workers.compile.counters import CompileCounters
from workers.compile.errors import BuildFailedError
from workers.compile.model import CompiledModel, CompileReport, compile_model
from workers.compile.stitch import PieceInfo
from workers.config import EngineConfig
from workers.graphs import (
    AttentionCGSupport,
    BatchDescriptor,
    CapturePlan,
    CUDAGraphMode,
    ForwardContext,
    GraphCounters,
    GraphDispatcher,
    GraphMemoryBudget,
    GraphReport,
    HistogramStore,
    LastRows,
    MemoryPolicy,
    Traffic,
    keep_last_rows,
    make_report,
    resolve_mode_with_reason,
    set_forward_context,
)
from workers.graphs.backends.factory import make_graph_backend
from workers.graphs.capturer import GraphCapturer
from workers.graphs.pacing import CapturePacer
from workers.graphs.report import summary_line
from workers.graphs.resolve import ModeResolution
from workers.graphs.wrapper import CUDAGraphWrapper
from workers.model.decoder import DecoderForCausalLM
from workers.modes import CompilationMode
from workers.runner.capture_sizes import capture_sizes, make_histogram_store
from workers.runner.cpu_model import CpuModel
from workers.runner.decode_batch import DecodeBatch, DecodeInputs
from workers.runner.decode_graphs import DecodeGraphs
from workers.runner.input_batch import InputBatch, StepInputs
from workers.sampling.logprobs import LogprobsTensors
from workers.sampling.plan import GREEDY_PLAN, SamplingPlan
from workers.sampling.sampler import Sampler
from workers.scheduler.output import SchedulerOutput
from workers.startup.account import StartupAccount
from workers.startup.report import LookupRow

logger = logging.getLogger(__name__)

_NO_GRAPH = CUDAGraphMode.NONE


class GraphedModel:
    """Runs padded batches, compiled or not, with or without captured graphs.

    Args:
        config: The engine's configuration.
        model: The decoder.
        backend: Its attention.
        kv_caches: Per layer.
        batch: Owner of the input buffers of any step; dummy batches for captures come from it.
        decode_batch: The same for pure decodes.
        sampler: Part of a decode step.
        library: Where compiled pieces are looked for and published.
        key: Of their bundle.
        flight: Decides who of several replicas builds them.
        account: Where this start is written down.
        compile_counters: Of the engine, kept up to date.
        histogram_store: Where the batch sizes seen are kept; by default a file of this user's artifact folder.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: DecoderForCausalLM,
        backend: AttentionBackend,
        kv_caches: Sequence[torch.Tensor],
        batch: InputBatch,
        decode_batch: DecodeBatch,
        sampler: Sampler,
        library: ArtifactLibrary,
        key: BundleKey,
        flight: BuildFlight,
        account: StartupAccount,
        compile_counters: CompileCounters,
        histogram_store: HistogramStore | None = None,
    ) -> None:
        self._model = model
        self._attn_backend = backend
        self._kv_caches = kv_caches
        self._batch = batch
        self._decode_batch = decode_batch
        self._graph_backend = make_graph_backend(backend.device)
        compilation = config.compilation_config
        self._counters = GraphCounters()
        self._checks_inputs = compilation.debug_graph_inputs
        self.compiled = self._compile(config, library, key, flight, account, compile_counters)
        self._resolution = _resolve(config, self.compiled.mode, backend, self._graph_backend.freezes_context)
        sizes: list[int] = []
        self._traffic, self._sizes_from = Traffic(), "graphs are off"
        if self._resolution.mode is not _NO_GRAPH:
            self._traffic = Traffic(histogram_store or make_histogram_store(config, model.config, library, key))
            sizes, self._sizes_from = capture_sizes(config, self._traffic)
        self._dispatcher = GraphDispatcher(
            self._resolution.mode,
            sizes,
            config.max_num_seqs,
            counters=self._counters,
            traffic=self._traffic,
        )
        self._plan = CapturePlan(
            self._dispatcher.capture_order(),
            config.max_num_seqs,
            first_sizes=compilation.cudagraph_first_sizes,
            histogram=self._traffic.histogram,
        )
        self._budget = GraphMemoryBudget(
            compilation.cudagraph_memory_limit_bytes, MemoryPolicy(compilation.cudagraph_memory_policy)
        )
        self._capturer = GraphCapturer(
            self._graph_backend,
            self._dispatcher,
            self._plan,
            self._budget,
            self._run_dummy,
            counters=self._counters,
        )
        self._pacer = CapturePacer(on_wait=self._counters.record_busy_capture)
        is_plain = self.compiled.mode is CompilationMode.NONE and not config.enforce_eager
        self._run_model = (
            CpuModel(self.compiled, backend, kv_caches) if is_plain and backend.device.type == "cpu" else self.compiled
        )
        self._decode = DecodeGraphs(
            self._decode_logits, decode_batch, sampler, lambda step: self._wrap(step, CUDAGraphMode.FULL, "decode")
        )
        self._forward = self._wrap(self._run_model, CUDAGraphMode.FULL, "model")

    def dispatch(self, output: SchedulerOutput, *, is_decode: bool) -> tuple[CUDAGraphMode, BatchDescriptor]:
        """The runtime mode and the padded size of a step; ``is_decode`` for a step of :meth:`run_decode`."""
        return self._dispatcher.dispatch(output.num_reqs, output.num_tokens, 1 if is_decode else None)

    def run(self, inputs: StepInputs, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> torch.Tensor:
        """Run the model on a prepared batch.

        Returns:
            Hidden states ``[T, E]``, valid until the next call.
        """
        with self._context(inputs.geometry, mode, descriptor):
            hidden_TE: torch.Tensor = self._forward(inputs.input_ids_T, inputs.positions_T)
            return hidden_TE

    def run_for_last_rows(self, inputs: StepInputs, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> torch.Tensor:
        """Run the model on a prepared batch for the sake of each request's last token.

        Without a graph, most of the last layer is computed for these tokens alone.

        Returns:
            Hidden states ``[R, E]``, valid until the next call.
        """
        geometry = inputs.geometry
        with self._context(geometry, mode, descriptor, last_rows_only=mode is _NO_GRAPH):
            hidden: torch.Tensor = self._forward(inputs.input_ids_T, inputs.positions_T)
        # Not every form of the model leaves rows out; and if there are as many rows as requests, they are these.
        return hidden if len(hidden) == geometry.num_reqs else hidden.index_select(0, geometry.last_rows())

    def run_decode(
        self, inputs: DecodeInputs, plan: SamplingPlan, mode: CUDAGraphMode, descriptor: BatchDescriptor
    ) -> tuple[torch.Tensor, LogprobsTensors | None]:
        """Run and sample a prepared decode step; see :class:`DecodeGraphs`."""
        with self._decode_context(inputs, mode, descriptor):
            return self._decode(inputs.table_RF, plan, inputs.num_reqs)

    def capture_first_set(self) -> None:
        """Capture what serves every decode batch by padding; afterwards the engine is ready."""
        self._capturer.capture_first_set()
        if self._resolution.mode is not _NO_GRAPH:
            logger.info("%s", summary_line(self.report()))

    @property
    def is_gap_due(self) -> bool:
        """Whether a gap between two steps of a busy engine has a use; see :meth:`use_gap`."""
        return self._pacer.is_due

    def use_gap(self, idle: bool) -> bool:
        """Between two steps: make at most one of the remaining captures, and keep the batch sizes seen.

        Args:
            idle: Nothing waits. Otherwise only what running batches miss is captured, for a small share of the time.

        Returns:
            Whether a capture was made, so that more may be left.
        """
        self._traffic.save_if_due()
        if idle:
            return self._capturer.capture_next(idle=True) or self._capture_wanted()
        return self._pacer.run(lambda: self._capturer.capture_needed() or self._capture_wanted())

    def save_traffic(self) -> None:
        """Keep the batch sizes seen since the last time."""
        self._traffic.save()

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        """Sizes that a decode batch can be padded to now, ascending."""
        return self._dispatcher.decode_sizes

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
            sizes_from=self._sizes_from,
        )

    def release(self) -> None:
        """Drop every graph: another takes over."""
        self._traffic.save()
        self._capturer.clear()

    def _compile(
        self,
        config: EngineConfig,
        library: ArtifactLibrary,
        key: BundleKey,
        flight: BuildFlight,
        account: StartupAccount,
        counters: CompileCounters,
    ) -> CompiledModel:
        """The model compiled, or as it is if the compiler fails."""
        # Not the batch's buffers: an eager model may be serving from them.
        ids_T = torch.zeros(2, dtype=torch.int64, device=self._attn_backend.device)
        example_args = {"input_ids_T": ids_T, "positions_T": ids_T.clone()}
        compilation, compile_mode = config.compilation_config, config.compile_mode(self._attn_backend.device.type)
        wanted = _resolve(config, compile_mode, self._attn_backend, self._graph_backend.freezes_context, warns=False)
        wrap_piece = self._wrap_piece if wanted.mode.has_piecewise() else None
        try:
            compiled = compile_model(
                self._model,
                compilation,
                example_args,
                enforce_eager=config.enforce_eager,
                splitting_ops=self._attn_backend.splitting_ops,
                wrap_piece=wrap_piece,
                keep_rows=keep_last_rows,
                library=library,
                key=key,
                flight=flight,
                account=account,
                counters=counters,
            )
        except BuildFailedError as error:
            logger.error("the model runs eagerly: %s", error)
            account.looked_up(LookupRow("artifacts", False, str(error)))
            library.counters.num_eager_starts += 1
            return compile_model(self._model, compilation, example_args, enforce_eager=True)
        if compiled.mode is not CompilationMode.NONE:
            logger.info("compiled: %s", compiled.report)
        if compiled.mode is CompilationMode.VLLM_COMPILE:
            account.looked_up(_lookup_row(compiled.report))
        return compiled

    def _wrap_piece(self, piece: Callable[..., Any], info: PieceInfo) -> CUDAGraphWrapper:
        return self._wrap(piece, CUDAGraphMode.PIECEWISE, f"piece {info.index}")

    def _wrap(self, function: Callable[..., Any], mode: CUDAGraphMode, name: str) -> CUDAGraphWrapper:
        return CUDAGraphWrapper(
            function,
            mode,
            self._graph_backend,
            name=name,
            debug_graph_inputs=self._checks_inputs,
            counters=self._counters,
        )

    def _decode_logits(self, input_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        return self._model.compute_logits(self._run_model(input_ids_T, positions_T))

    def _context(
        self,
        geometry: BatchGeometry,
        mode: CUDAGraphMode,
        descriptor: BatchDescriptor,
        *,
        last_rows_only: bool = False,
    ) -> AbstractContextManager[ForwardContext]:
        backend = self._attn_backend
        metadata = backend.build_metadata(geometry)
        last = LastRows(geometry.last_rows, backend.for_last_rows(metadata)) if last_rows_only else None
        return set_forward_context(ForwardContext(backend, metadata, self._kv_caches, mode, descriptor, last))

    def _decode_context(
        self, inputs: DecodeInputs, mode: CUDAGraphMode, descriptor: BatchDescriptor
    ) -> AbstractContextManager[ForwardContext]:
        self._decode.unpack_ahead(inputs.table_RF, mode)
        return self._context(inputs.geometry, mode, descriptor)

    def _run_dummy(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        if descriptor.uniform:
            self._run_dummy_decode(mode, descriptor, GREEDY_PLAN)
        else:
            self.run(self._batch.prepare_dummy(descriptor.num_tokens, descriptor.num_reqs or 1, 2), mode, descriptor)

    def _run_dummy_decode(self, mode: CUDAGraphMode, descriptor: BatchDescriptor, plan: SamplingPlan) -> None:
        inputs = self._decode_batch.prepare_dummy(descriptor.num_tokens)
        with self._decode_context(inputs, mode, descriptor):
            self._decode.capture(inputs.table_RF, plan)

    def _capture_wanted(self) -> bool:
        """Capture the decode graph of one more sampling plan, if steps asked for it; returns whether there was one."""
        wanted = self._decode.next_wanted()
        if wanted is None:
            return False
        plan, descriptor = wanted
        self._decode.settle(plan, descriptor)
        if self._budget.admit(CUDAGraphMode.FULL, descriptor):
            with self._graph_backend.capturing(clean_up=False):
                for mode in (_NO_GRAPH, CUDAGraphMode.FULL):
                    self._run_dummy_decode(mode, descriptor, plan)
            self._budget.note_held(self._graph_backend.bytes_held())
        return True


def _lookup_row(report: CompileReport) -> LookupRow:
    """What the account says of the pieces. What a hit saved is what building took, less what getting them took."""
    spent_s = report.find_seconds + report.fetch_seconds + report.check_seconds + report.load_seconds
    reason = "" if report.is_warm else (report.miss or str(report.outcome))
    saved_s = max(report.saved_seconds - spent_s, 0.0) if report.is_warm else 0.0
    return LookupRow("artifacts", report.is_warm, reason, report.num_bytes, round(saved_s, 3))


def _resolve(
    config: EngineConfig,
    compile_mode: CompilationMode,
    backend: AttentionBackend,
    freezes_context: bool,
    *,
    warns: bool = True,
) -> ModeResolution:
    """The mode that runs. Only a mode that the user asked for is worth a warning when it cannot be had."""
    support = backend.cudagraph_support if freezes_context else AttentionCGSupport.ALWAYS
    requested = config.compilation_config.cudagraph_mode
    if config.enforce_eager:
        return ModeResolution(requested or _NO_GRAPH, _NO_GRAPH, "enforce_eager turns graphs off")
    is_default = requested is None
    if requested is None:
        on_cuda = backend.device.type == "cuda"
        requested = CUDAGraphMode.FULL_AND_PIECEWISE if on_cuda else _NO_GRAPH
    resolution = resolve_mode_with_reason(
        requested, compile_mode, support, attention_is_split=compile_mode is CompilationMode.VLLM_COMPILE
    )
    if resolution.reason is not None and warns:
        logger.log(logging.INFO if is_default else logging.WARNING, "%s", resolution.reason)
    return resolution
