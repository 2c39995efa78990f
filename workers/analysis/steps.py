"""A model as steps, compiled pieces and the ops between them, that can be run in part.

The first steps, or the first nodes of one piece, as a function of their own: that is how the first wrong one is found.
Knows plans, graphs and pieces; knows nothing about batches or about what counts as wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from workers.analysis.harness import ModelHarness
from workers.compile.canonical import input_specs
from workers.compile.compiler import split_model
from workers.compile.decorator import dynamic_arg_dims
from workers.compile.formats.base import PieceFormat, make_format
from workers.compile.formats.fx_code import function_of, source_of
from workers.compile.key import inductor_options
from workers.compile.passes.standard import standard_passes
from workers.compile.plan import PieceStep, Value
from workers.compile.specialize import example_inputs
from workers.compile.split import op_name
from workers.compile.stitch import LoadedPiece, PieceInfo, WrapPiece, stitch
from workers.compile.weights import weight_names
from workers.graphs import CompilationMode

#: Runs part of a model: ``(input_ids_T, positions_T)`` to the tensors that are of interest.
Part = Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]


class ModelSteps:
    """See the module.

    Args:
        harness: Of the model; its compilation config says how pieces are compiled.

    Attributes:
        plan: All steps.
        compiled: Pieces as they are served, by key.
        format: How they were compiled.
    """

    def __init__(self, harness: ModelHarness) -> None:
        config = harness.config.compilation_config.model_copy(update={"mode": CompilationMode.VLLM_COMPILE})
        self.compiled: dict[str, LoadedPiece] = {}

        def keep(piece: Callable[..., Any], info: PieceInfo) -> Callable[..., Any]:
            self.compiled.setdefault(info.key, LoadedPiece(piece))
            return piece

        model = harness.compiled(config, keep)
        assert model.plan is not None
        assert model.report.piece_format is not None
        self.plan = model.plan
        self._format: PieceFormat = make_format(model.report.piece_format, inductor_options(config))
        self._weights = weight_names(harness.model)
        self._harness = harness
        self._passes = standard_passes(config.pass_config, harness.attention.splitting_ops)

    @functools.cached_property
    def graphs(self) -> dict[str, fx.GraphModule]:
        """Pieces as graphs, by key. Traces the model once more, so only where something is wrong."""
        model, device = self._harness.model, self._harness.device
        ids = torch.zeros(2, dtype=torch.int64, device=device)
        return split_model(
            model,
            {"input_ids_T": ids, "positions_T": ids.clone()},
            dynamic_arg_dims(model),
            splitting_ops=self._harness.attention.splitting_ops,
            passes=self._passes,
            factors={},
        ).graphs

    @functools.cached_property
    def plain(self) -> dict[str, LoadedPiece]:
        """The same pieces, run op by op."""
        return {key: run_op_by_op(graph) for key, graph in self.graphs.items()}

    def whole(self, pieces: Mapping[str, LoadedPiece], wrap_piece: WrapPiece | None = None) -> Any:
        """The forward pass, with something around each piece."""
        return stitch(self.plan, pieces, self._weights, wrap_piece=wrap_piece)

    def first(self, count: int, pieces: Mapping[str, LoadedPiece], wrap_piece: WrapPiece | None = None) -> Part:
        """The first steps, giving what the last of them gave; of an op between pieces, what it may have written."""
        step = self.plan.steps[count - 1]
        if isinstance(step, PieceStep):
            results = self.graphs[step.piece].graph.output_node().args[0]
            assert isinstance(results, tuple | list)
            pairs = zip(step.results, results, strict=True)
            watched: list[Value] = [name for name, node in pairs if not _is_uninitialised(node)]
        else:
            values = [*step.args, *step.kwargs.values(), step.result]
            watched = [value for value in values if isinstance(value, str) and value.startswith("v")]
        return self._part(count, watched, pieces, wrap_piece)

    def inputs_of(self, index: int, pieces: Mapping[str, LoadedPiece]) -> Part:
        """The steps before piece step ``index``, giving its inputs."""
        return self._part(index, self._piece_step(index).args, pieces, None)

    def graph_of(self, index: int) -> fx.GraphModule:
        """The graph of piece step ``index``."""
        return self.graphs[self._piece_step(index).piece]

    def compile(self, graph: fx.GraphModule) -> LoadedPiece:
        """A piece's graph, or part of one, compiled as pieces are served."""
        return self._format.load(self._format.build(source_of(graph), example_inputs(input_specs(graph), None)))

    def is_piece(self, index: int) -> bool:
        """Whether step ``index`` is a piece, and not an op between pieces."""
        return isinstance(self.plan.steps[index], PieceStep)

    def describe(self, index: int) -> tuple[str, str | None]:
        """Where step ``index`` is, and which op it is if it is one between pieces."""
        num_pieces = sum(self.is_piece(before) for before in range(index))
        step = self.plan.steps[index]
        if isinstance(step, PieceStep):
            return f"piece {num_pieces}", None
        constants = ", ".join(str(arg["const"]) for arg in step.args if isinstance(arg, dict))
        return f"after piece {num_pieces - 1}", f"{step.op}({constants})"

    @property
    def argument_names(self) -> list[str]:
        """What the model takes."""
        return [argument.name for argument in self.plan.arguments]

    def input_names(self, call: int) -> list[str]:
        """What piece call number ``call`` takes: arguments and weights by name, other values by number."""
        steps = [step for step in self.plan.steps if isinstance(step, PieceStep)]
        return [self._input_name(value) for value in steps[call].args]

    def _input_name(self, value: Value) -> str:
        if isinstance(value, str) and value[0] == "a":
            return self.plan.arguments[int(value[1:])].name
        if isinstance(value, str) and value[0] == "w":
            return self.plan.weights[int(value[1:])].name
        return f"value {value}"

    def _piece_step(self, index: int) -> PieceStep:
        step = self.plan.steps[index]
        assert isinstance(step, PieceStep)
        return step

    def _part(
        self, count: int, watched: list[Value], pieces: Mapping[str, LoadedPiece], wrap_piece: WrapPiece | None
    ) -> Part:
        plan = dataclasses.replace(self.plan, steps=self.plan.steps[:count], results=watched, returns_tuple=True)
        part: Part = stitch(plan, pieces, self._weights, wrap_piece=wrap_piece)
        return part


def run_op_by_op(graph: fx.GraphModule) -> LoadedPiece:
    """A piece as the ops of its graph."""
    return LoadedPiece(function_of(source_of(graph)))


def checkable_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """Nodes whose values can be compared: tensors that something was written to."""
    return [
        node
        for node in graph.graph.nodes
        if node.op in ("call_function", "call_method")
        and isinstance(node.meta.get("example_value"), torch.Tensor)
        and not _is_uninitialised(node)
    ]


def up_to(graph: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    """The graph cut off after ``last``, whose value it gives; it takes the same inputs."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        copies[node] = copy.node_copy(node, lambda old: copies[old])
        if node is last:
            break
    copy.output((copies[last],))
    return fx.GraphModule(graph, copy)


def name_of(node: fx.Node) -> str:
    """The op that a node calls, for people."""
    return op_name(node) or str(getattr(node.target, "__name__", node.target))


def _is_uninitialised(node: fx.Node) -> bool:
    return "empty" in name_of(node)
