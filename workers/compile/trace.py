"""One Dynamo trace of a model, as a graph whose inputs have names.

Knows how to get the full graph out of Dynamo, and that it must be one graph. Nothing is compiled and nothing is run
here: Dynamo hands its graph over, and compiling starts after it has returned.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from workers.compile import torch_compat
from workers.compile.composites import COMPOSITES
from workers.compile.counters import CompileCounters
from workers.compile.errors import CompileError, GraphBreakError
from workers.compile.weights import weight_names

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class TracedModel:
    """A model as one graph.

    Attributes:
        graph: Torch-level operations; placeholders carry fake values as ``meta["example_value"]``.
        arguments: Placeholder of each argument of ``forward`` that the graph uses, by the argument's name.
        weights: Name of each parameter or buffer, by its placeholder.
        returns_tuple: Whether ``forward`` returns a tuple of tensors, and not one tensor.
        seconds: What the trace took.
    """

    graph: fx.GraphModule
    arguments: dict[str, fx.Node]
    weights: dict[fx.Node, str]
    returns_tuple: bool
    seconds: float


def fresh_forward(model: nn.Module) -> Callable[..., Any]:
    """``model.forward`` with a code object of its own.

    Dynamo keeps what it compiled on the code object, so models of one class would share its recompile limit.
    """
    function = type(model).forward
    copied = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(copied, model)


def example_copies(
    example_args: Mapping[str, torch.Tensor], dims: Mapping[str, int], *, size: int | None = None
) -> list[torch.Tensor]:
    """Copies of the example arguments with their dynamic dimension marked as one that varies.

    Args:
        size: A typical size, to which the copies are repeated or cut, and to which nothing is specialised that holds
            from 2 on. None marks a size that nothing is known about, 0 and 1 included.

    Raises:
        CompileError: An argument is missing, or has no such dimension.
    """
    copies = []
    for name, dim in dims.items():
        if name not in example_args:
            raise CompileError(f"No example for argument {name}; there are examples of {', '.join(example_args)}.")
        copy = example_args[name].clone()
        if not -copy.dim() <= dim < copy.dim():
            raise CompileError(f"Argument {name} has {copy.dim()} dimensions, so dimension {dim} cannot be dynamic.")
        dim %= copy.dim()
        if size is None:
            torch_compat.mark_unbacked(copy, dim)
        else:
            rows = torch.arange(size, device=copy.device) % copy.shape[dim]
            copy = copy.index_select(dim, rows)
            torch_compat.mark_dynamic(copy, dim)
        copies.append(copy)
    return copies


def trace(
    model: nn.Module,
    example_args: Mapping[str, torch.Tensor],
    dims: Mapping[str, int],
    counters: CompileCounters | None = None,
) -> TracedModel:
    """Trace ``model.forward`` for every size of the dynamic dimensions.

    Args:
        example_args: A tensor for each argument in ``dims``; values do not matter.
        dims: The dynamic dimension of each argument, in the order of ``forward``'s parameters.
        counters: Counts traces and graph breaks.

    Raises:
        GraphBreakError: The model does not trace into one graph.
    """
    counters = counters or CompileCounters()
    started = time.perf_counter()
    captured: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def keep(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured.append((graph, inputs))
        results = graph.graph.output_node().args[0]
        assert isinstance(results, tuple | list)
        num_outputs = len(results)
        return lambda *_: (None,) * num_outputs

    with torch.inference_mode(False), torch.no_grad():
        copies = example_copies(example_args, dims)
        with torch_compat.kept_whole(COMPOSITES):
            result = run_dynamo(torch.compile(fresh_forward(model), backend=keep, fullgraph=True), copies, counters)
    counters.num_traces += 1
    assert len(captured) == 1
    graph, inputs = captured[0]
    if result is not None and (type(result) is not tuple or any(item is not None for item in result)):
        raise CompileError(f"{type(model).__name__}.forward must return a tensor or a tuple of tensors.")
    arguments, weights = _name_inputs(graph, inputs, model, dict(zip(dims, copies, strict=True)))
    return TracedModel(graph, arguments, weights, result is not None, time.perf_counter() - started)


def run_dynamo(compiled: Callable[..., Any], args: Sequence[torch.Tensor], counters: CompileCounters) -> Any:
    """Call something that Dynamo traces in full.

    Args:
        counters: Counts graph breaks.

    Raises:
        GraphBreakError: It does not trace into one graph.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        return compiled(*args)
    except TorchDynamoException as error:
        if type(error).__name__ == "BackendCompilerFailed":
            raise
        counters.num_graph_breaks += 1
        message = f"{torch_compat.user_line(error)} cannot be traced: {_first_sentence(error)}"
        logger.error("%s", message)
        raise GraphBreakError(message) from error


def _first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0].removesuffix(".") + "."


def _name_inputs(
    graph: fx.GraphModule, inputs: Sequence[Any], model: nn.Module, copies: Mapping[str, torch.Tensor]
) -> tuple[dict[str, fx.Node], dict[fx.Node, str]]:
    """Tell arguments from weights by the tensors that Dynamo handed over with the graph."""
    names: dict[int, str] = {}
    for name, tensor in weight_names(model).items():
        names.setdefault(id(tensor), name)
    argument_names = {id(copy): name for name, copy in copies.items()}
    arguments: dict[str, fx.Node] = {}
    weights: dict[fx.Node, str] = {}
    for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(value, torch.SymInt):
            continue
        if id(value) in argument_names:
            arguments[argument_names[id(value)]] = node
        elif id(value) in names:
            weights[node] = names[id(value)]
        else:
            raise CompileError(
                f"The graph reads {node.name}, which is neither an argument nor a parameter or buffer of the model;"
                " register it as a buffer."
            )
    return arguments, weights
