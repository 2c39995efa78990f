"""A piece for one value of its dynamic dimension: the same operations with every size a number.

Knows graphs and fake tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def specialize(graph: fx.GraphModule, size: int | None) -> fx.GraphModule:
    """A copy of a piece whose dynamic sizes are ``size``; with None the copy is as dynamic as the piece.

    Compilers change the graphs they are given, so they get a copy in any case.
    """
    copy = fx.GraphModule(torch.nn.Module(), _copy_with_values(graph.graph))
    if size is not None:
        _Static(copy, size).replace_values()
    return copy


def _copy_with_values(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, values)
    copy.output(output)
    for node, copied in values.items():
        if "example_value" in node.meta:
            copied.meta["example_value"] = node.meta["example_value"]
    return copy


class _Static(fx.Interpreter):
    """Runs a graph on fake tensors of fixed sizes and writes down what every node gives."""

    def __init__(self, graph: fx.GraphModule, size: int) -> None:
        super().__init__(graph)
        self._placeholders = graph.graph.find_nodes(op="placeholder")
        self._size = size

    def replace_values(self) -> None:
        """Replace every node's example value."""
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
            self.run(*[self._tensor(node.meta["example_value"]) for node in self._placeholders])

    def run_node(self, n: fx.Node) -> Any:
        """Run and record."""
        result = super().run_node(n)
        if n.op != "output":
            n.meta["example_value"] = result
        return result

    def _tensor(self, dynamic: torch.Tensor) -> torch.Tensor:
        shape = [self._number(size) for size in dynamic.shape]
        stride = [self._number(step) for step in dynamic.stride()]
        return torch.empty_strided(shape, stride, dtype=dynamic.dtype, device=dynamic.device)

    def _number(self, size: int | torch.SymInt) -> int:
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, self._size)))
