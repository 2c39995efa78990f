"""A piece as a compiler should see it: for one size of its dynamic dimension, or for any.

The trace gives the dynamic dimension a size that nothing is known about, so that 0 and 1 are not special. A compiler
does worse with such sizes: Inductor, for one, scores every fusion by the bytes it saves, takes those of an unknown size
for zero, and leaves most kernels apart. So a piece is compiled for a symbol with a typical value instead. Whatever the
compiler concludes from that value is checked by nobody; it holds for one token too as long as the piece's operations
treat tokens alike.

Knows graphs and fake tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

#: The typical size. Inductor picks launch shapes by it; the smallest power of two that fills a large GPU with rows.
TYPICAL_SIZE = 256


def specialize(graph: fx.GraphModule, size: int | None) -> fx.GraphModule:
    """A copy of a piece with new example values.

    Compilers change the graphs they are given, so they get a copy in any case.

    Args:
        size: Of every dynamic dimension; None stands for any size.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    copy = fx.GraphModule(torch.nn.Module(), _copy_with_values(graph.graph))
    shape_env = ShapeEnv(specialize_zero_one=False)
    symbol = _new_symbol(shape_env) if size is None else size
    with FakeTensorMode(shape_env=shape_env), torch.no_grad():
        _Revaluation(copy).revalue(symbol)
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


def _new_symbol(shape_env: Any) -> torch.SymInt:
    """A size with a typical value that no input's shape decides."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource("num_tokens")
    symbol = shape_env.create_symbol(TYPICAL_SIZE, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    size: torch.SymInt = shape_env.create_symintnode(symbol, hint=TYPICAL_SIZE, source=source)
    return size


class _Revaluation(fx.Interpreter):
    """Runs a graph on new fake tensors and writes down what every node gives."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self._placeholders = graph.graph.find_nodes(op="placeholder")

    def revalue(self, size: int | torch.SymInt) -> None:
        """Replace every node's example value."""
        self.run(*[_tensor(node.meta["example_value"], size) for node in self._placeholders])

    def run_node(self, n: fx.Node) -> Any:
        """Run and record."""
        result = super().run_node(n)
        if n.op != "output":
            n.meta["example_value"] = result
        return result


def _tensor(dynamic: torch.Tensor, size: int | torch.SymInt) -> torch.Tensor:
    """A tensor like ``dynamic`` with every symbol replaced by ``size``."""
    shape = [_evaluate(value, size) for value in dynamic.shape]
    stride = [_evaluate(value, size) for value in dynamic.stride()]
    return torch.empty_strided(shape, stride, dtype=dynamic.dtype, device=dynamic.device)


def _evaluate(value: int | torch.SymInt, size: int | torch.SymInt) -> int | torch.SymInt:
    if not isinstance(value, torch.SymInt):
        return value
    import sympy  # type: ignore[import-untyped]

    expression = value.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    result: int | torch.SymInt = sympy.lambdify(symbols, expression)(*[size] * len(symbols))
    return result
