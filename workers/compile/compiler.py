"""The cold path: trace, passes, split, unique pieces, builds, plan.

Knows the order of these steps and what each of them gives; how a piece is compiled is its format's business, where
bytes are kept the store's.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from workers.artifacts.digest import sha256
from workers.compile.canonical import input_specs, operation_counts, piece_key, size_text
from workers.compile.counters import CompileCounters
from workers.compile.formats.base import PieceFormat
from workers.compile.formats.fx_code import source_of
from workers.compile.passes.manager import PassManager
from workers.compile.plan import Build, OpStep, PieceRecord, PieceStep, Plan, TensorSpec, Value
from workers.compile.specialize import example_inputs
from workers.compile.split import Region, SplitCall, split
from workers.compile.trace import TracedModel, trace
from workers.compile.weights import tensor_spec
from workers.startup.account import StartupAccount

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class SplitModel:
    """A model's plan, without builds, and its unique pieces as graphs.

    Attributes:
        graphs: Unique pieces by key, in the order of their first call.
        sources: The same as text, from which any format is built.
        full_graph: What was split, after the passes.
    """

    plan: Plan
    graphs: dict[str, fx.GraphModule]
    sources: dict[str, bytes]
    full_graph: fx.GraphModule


def split_model(
    model: nn.Module,
    example_args: Mapping[str, torch.Tensor],
    dims: Mapping[str, int],
    *,
    splitting_ops: Collection[str],
    passes: PassManager,
    factors: Mapping[str, Any],
    counters: CompileCounters | None = None,
) -> SplitModel:
    """Trace a model once and cut it into unique pieces; compiles nothing.

    Args:
        example_args: A tensor for each argument; values do not matter.
        dims: The dynamic dimension of each argument.
        splitting_ops: Qualified names of the ops to cut at.
        factors: For the plan.
        counters: Counts traces and graph breaks.

    Raises:
        GraphBreakError: The model is not one graph.
    """
    traced = trace(model, example_args, dims, counters)
    matches = passes.run(traced.graph.graph)
    parts = split(traced.graph.graph, splitting_ops)
    graphs: dict[str, fx.GraphModule] = {}
    plan = _Planner(traced, dims).plan(parts, graphs)
    plan.factors, plan.passes = dict(factors), matches
    calls = plan.piece_calls()
    logger.info("traced in %.2f s: %d pieces, %d of them unique", traced.seconds, len(calls), len(graphs))
    sources = {key: source_of(graph) for key, graph in graphs.items()}
    return SplitModel(plan, graphs, sources, traced.graph)


def build_pieces(
    plan: Plan,
    sources: Mapping[str, bytes],
    piece_format: PieceFormat,
    blobs: dict[str, bytes],
    sizes: Sequence[int | None] = (None,),
    account: StartupAccount | None = None,
) -> int:
    """Compile every unique piece, and put the builds into the plan.

    A plan and its pieces' sources are enough: there is no model, and no trace.

    Args:
        sources: What each piece computes, by its key.
        blobs: Takes the bytes of builds, by their digest.
        sizes: Values of the dynamic dimension to compile for; None stands for all of them.
        account: Where every build is written down, as part of a start.

    Returns:
        How many builds were made; those that the plan has already are kept.
    """
    num_built, account = 0, account or StartupAccount()
    for key, record in plan.pieces.items():
        for size in sizes:
            if record.find_build(piece_format.name, size) is not None:
                continue
            what = "every size" if size is None else f"size {size}"
            started = time.perf_counter()
            with account.phase(f"piece {key[:8]}", f"{piece_format.name} for {what}") as phase:
                data = piece_format.build(sources[key], example_inputs(record.inputs, size))
                phase.num_bytes = len(data)
            seconds = time.perf_counter() - started
            digest = sha256(data)
            blobs[digest] = data
            record.builds.append(Build(piece_format.name, size, digest, len(data), round(seconds, 3)))
            num_built += 1
            logger.info("piece %s for %s: %s, %.2f s, %d bytes", key[:8], what, piece_format.name, seconds, len(data))
    return num_built


class _Planner:
    """Gives names to the values of a split graph."""

    def __init__(self, traced: TracedModel, dims: Mapping[str, int]) -> None:
        self._traced = traced
        self._dims = dict(dims)
        self._symbols: dict[str, str] = {}
        names = list(self._dims)
        self._names: dict[fx.Node, str] = {node: f"a{names.index(name)}" for name, node in traced.arguments.items()} | {
            node: f"w{index}" for index, node in enumerate(traced.weights)
        }

    def plan(self, parts: Sequence[Region | SplitCall], graphs: dict[str, fx.GraphModule]) -> Plan:
        """The plan; unique pieces are added to ``graphs``."""
        arguments = [self._argument(name) for name in self._dims]
        steps = [self._step(part, graphs) for part in parts]
        results = self._traced.graph.graph.output_node().args[0]
        assert isinstance(results, tuple | list)
        return Plan(
            factors={},
            arguments=arguments,
            dynamic_dims=list(self._dims.values()),
            weights=[self._weight(node, name) for node, name in self._traced.weights.items()],
            steps=steps,
            results=[self._value(result) for result in results],
            returns_tuple=self._traced.returns_tuple,
            pieces={key: PieceRecord(operation_counts(graph), input_specs(graph)) for key, graph in graphs.items()},
            passes={},
            trace_seconds=round(self._traced.seconds, 3),
        )

    def _step(self, part: Region | SplitCall, graphs: dict[str, fx.GraphModule]) -> PieceStep | OpStep:
        if isinstance(part, SplitCall):
            args = [self._value(arg) for arg in part.node.args]
            kwargs = {key: self._value(arg) for key, arg in part.node.kwargs.items()}
            return OpStep(part.op, args, kwargs, self._new_name(part.node) if part.node.users else None)
        key = piece_key(part.graph)
        graphs.setdefault(key, part.graph)
        args = [self._value(node) for node in part.inputs]
        return PieceStep(key, args, [self._new_name(node) for node in part.outputs])

    def _new_name(self, node: fx.Node) -> str:
        name = self._names[node] = f"v{len(self._names)}"
        return name

    def _value(self, value: Any) -> Value:
        if isinstance(value, fx.Node):
            return self._names[value]
        if isinstance(value, list | tuple):
            return [self._value(item) for item in value]
        assert value is None or isinstance(value, bool | int | float | str), value
        return {"const": value}

    def _argument(self, name: str) -> TensorSpec:
        node = self._traced.arguments.get(name)
        if node is None:
            # The model does not read it.
            return TensorSpec(name, "", ())
        value = node.meta["example_value"]
        return TensorSpec(name, str(value.dtype), tuple(size_text(size, self._symbols) for size in value.shape))

    def _weight(self, node: fx.Node, name: str) -> TensorSpec:
        return tensor_spec(name, node.meta["example_value"])
