"""Launches of a real model's forward pass: what the launch model predicts, and what the profiler counts.

Cuts the model as the compile layer does, runs one decode batch in each form, and puts both side by side. On CUDA a
launch is a kernel or a graph that the host launched. On a CPU it is an op that Python dispatched or a replay of a host
graph; a host graph dispatches its ops again inside the replay, and those are not counted.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from workers.analysis.costs import describe_device
from workers.analysis.harness import Chunk, Forward, ModelHarness
from workers.analysis.launches import LaunchCounts, Segment, count_launches
from workers.analysis.profile import WorkProfile, profile_work
from workers.compile.compiler import SplitModel, split_model
from workers.compile.composites import lower
from workers.compile.decorator import dynamic_arg_dims
from workers.compile.key import ATTENTION_OPS
from workers.compile.passes.manager import PassManager
from workers.compile.plan import PieceStep
from workers.config import EngineConfig
from workers.graphs import (
    AttentionCGSupport,
    BatchDescriptor,
    CompilationMode,
    CUDAGraphMode,
    CUDAGraphWrapper,
    GraphCounters,
)
from workers.runner.cpu_model import CpuModel

_STEPS = 3
_CONTEXT = 32


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchRow:
    """One form of the forward pass.

    Attributes:
        predicted: Launches that the model predicts; None where it says nothing.
        kernels: Launches of single kernels (dispatched ops), counted.
        graphs: Launches (replays) of graphs, counted.
        note: What to know about the figures; empty if nothing.
    """

    form: str
    predicted: int | None
    kernels: float
    graphs: float
    note: str = ""

    @property
    def measured(self) -> float:
        """All launches counted."""
        return self.kernels + self.graphs


@dataclasses.dataclass(frozen=True, slots=True)
class ModelLaunches:
    """A model's segments and launches.

    Attributes:
        unit: What counts as a launch on this device.
    """

    device: str
    unit: str
    batch: int
    segments: list[Segment]
    predicted: LaunchCounts
    rows: list[LaunchRow]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def count_model_launches(config: EngineConfig, batch: int = 1) -> ModelLaunches:
    """Predict and count the launches of one decode step's forward pass.

    Args:
        batch: Requests of the decode batch.

    Raises:
        ConfigError: As an engine's start.
    """
    small = {"max_num_seqs": batch, "max_num_batched_tokens": max(8, batch), "max_model_len": 2 * _CONTEXT}
    harness = ModelHarness(config.model_copy(update=small), 2 * _CONTEXT)
    on_cuda = harness.device.type == "cuda"
    segments = list(_segments(_split(harness), on_cuda=on_cuda))
    predicted = count_launches(segments)
    counters = GraphCounters()
    rows = [_count(harness, form, batch, counters) for form in _forms(harness, predicted, counters)]
    return ModelLaunches(
        device=describe_device(harness.device),
        unit="kernels and graphs launched by the host" if on_cuda else "ops dispatched, and host graphs replayed",
        batch=batch,
        segments=segments,
        predicted=predicted,
        rows=rows,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """One way to run the forward pass.

    Attributes:
        make: Gives what to call.
        mode: NONE, or the mode of the graphs in it.
    """

    name: str
    predicted: int | None
    make: Callable[[], Forward]
    mode: CUDAGraphMode = CUDAGraphMode.NONE
    note: str = ""


def _forms(harness: ModelHarness, predicted: LaunchCounts, counters: GraphCounters) -> Iterator[_Form]:
    pieces = harness.config.compilation_config.model_copy(update={"mode": CompilationMode.VLLM_COMPILE})

    def wrapped(function: Callable[..., Any], mode: CUDAGraphMode) -> CUDAGraphWrapper:
        return CUDAGraphWrapper(function, mode, harness.graph_backend, counters=counters)

    def native() -> Forward:
        return CpuModel(harness.model, harness.attention, harness.kv_caches)

    def piecewise() -> Forward:
        return harness.compiled(pieces, lambda piece, _: wrapped(piece, CUDAGraphMode.PIECEWISE))

    def full() -> Forward:
        return wrapped(harness.decode_logits(harness.compiled(pieces)), CUDAGraphMode.FULL)

    yield _Form("eager", predicted.eager, lambda: harness.model)
    if harness.device.type == "cpu":
        yield _Form("native program", 1, native, note="one native call, which the profiler does not see")
    yield _Form("compiled pieces", None, lambda: harness.compiled(pieces), note="no graphs")
    yield _Form("PIECEWISE", predicted.piecewise, piecewise, CUDAGraphMode.PIECEWISE)
    yield _Form("FULL", predicted.full, full, CUDAGraphMode.FULL, "the logits are in the graph too")


def _count(harness: ModelHarness, form: _Form, num_reqs: int, counters: GraphCounters) -> LaunchRow:
    forward = form.make()
    if isinstance(forward, CpuModel) and not forward.has_program:
        return LaunchRow(form.name, None, 0.0, 0.0, "this model cannot be recorded")
    is_full = form.mode is CUDAGraphMode.FULL
    descriptor = BatchDescriptor(num_reqs, num_reqs, uniform=True) if is_full else BatchDescriptor(num_reqs)
    if (
        is_full
        and harness.graph_backend.freezes_context
        and harness.attention.cudagraph_support is AttentionCGSupport.NEVER
    ):
        return LaunchRow(form.name, form.predicted, 0.0, 0.0, "this attention backend cannot be captured")
    if form.mode is not CUDAGraphMode.NONE:
        harness.capture(forward, form.mode, descriptor)
    batch = harness.batch([Chunk(1, _CONTEXT)] * num_reqs, descriptor)

    def run() -> None:
        for _ in range(_STEPS):
            harness.run(forward, batch, form.mode, descriptor)

    run()
    before = counters.num_replays()
    profiled = profile_work(run, _STEPS, harness.device)
    replays = (counters.num_replays() - before) / _STEPS
    kernels, graphs = _launched(profiled, replays, form.mode, harness)
    return LaunchRow(form.name, form.predicted, kernels, graphs, form.note)


def _launched(profiled: WorkProfile, replays: float, mode: CUDAGraphMode, harness: ModelHarness) -> tuple[float, float]:
    """Launches of single kernels and of graphs."""
    if harness.device.type == "cuda":
        return profiled.kernel_launches, profiled.graph_launches
    if mode is CUDAGraphMode.NONE:
        return profiled.kernel_launches, 0.0
    # What a replay dispatches again is part of it. Attention alone runs between the pieces.
    attention = sum(profiled.dispatched[op] for op in harness.attention.splitting_ops) / _STEPS
    return (attention if mode is CUDAGraphMode.PIECEWISE else 0.0), replays


def _split(harness: ModelHarness) -> SplitModel:
    """The model as it is written: no pass rewrites it."""
    ids = torch.zeros(2, dtype=torch.int64, device=harness.device)
    example = {"input_ids_T": ids, "positions_T": ids.clone()}
    dims = dynamic_arg_dims(harness.model)
    return split_model(harness.model, example, dims, splitting_ops=ATTENTION_OPS, passes=PassManager([]), factors={})


def _segments(split: SplitModel, *, on_cuda: bool) -> Iterator[Segment]:
    count = _num_kernels if on_cuda else _num_dispatches
    num_ops = {key: count(graph) for key, graph in split.graphs.items()}
    index = 0
    for step in split.plan.steps:
        if isinstance(step, PieceStep):
            yield Segment(f"piece {index}", num_ops[step.piece], is_captured=True)
            index += 1
        else:
            yield Segment(step.op, 1, is_captured=False)


def _num_dispatches(graph: fx.GraphModule) -> int:
    """Ops that Python calls one by one; what reads or checks a size is none."""
    return sum(_gives_tensors(node) and node.target is not operator.getitem for node in graph.graph.nodes)


def _num_kernels(graph: fx.GraphModule) -> int:
    """ATen ops that compute something: neither views nor allocations."""
    inputs = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
    return sum(_gives_tensors(node) and _is_kernel(node.target) for node in lower(graph, inputs).graph.nodes)


def _gives_tensors(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    value = node.meta.get("example_value")
    values = value if isinstance(value, tuple | list) else (value,)
    return all(isinstance(item, torch.Tensor) for item in values) and len(values) > 0


def _is_kernel(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target.is_view and not str(target).startswith("aten.empty")
