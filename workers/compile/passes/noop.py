"""Removes what changes nothing: checks that are settled, conversions and views to what is there, dead code.

A compiler does the same later; doing it first makes equal pieces print equal code, and leaves pieces that run as they
stand with nothing to do but their work.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from workers.compile import torch_compat
from workers.compile.passes.manager import GraphPass
from workers.compile.split import op_name, tensor_of

_CHECKS = frozenset({"aten::_assert_scalar", "aten::_assert_async", "aten::sym_constrain_range_for_size"})
_VIEWS = frozenset({"view", "reshape", "expand"})
_CONVERSIONS = frozenset({"to", "type", "float", "half", "bfloat16", "contiguous"})


class NoopElimination(GraphPass):
    """See the module."""

    name: ClassVar[str] = "noop_elimination"

    def run(self, graph: fx.Graph) -> int:
        """Counts every node removed."""
        num_removed = 0
        for node in list(graph.nodes):
            if op_name(node) in _CHECKS:
                # The sizes they check are those that the caller's own check of the arguments covers.
                graph.erase_node(node)
                num_removed += 1
            elif _returns_its_input(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                num_removed += 1
        return num_removed + remove_dead(graph)


def remove_dead(graph: fx.Graph) -> int:
    """Remove nodes whose result nobody uses and that do nothing else; returns how many."""
    num_removed = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method") and not torch_compat.has_effect(node):
            graph.erase_node(node)
            num_removed += 1
    return num_removed


def _returns_its_input(node: fx.Node) -> bool:
    """Whether a view or a conversion gives a tensor of the same shape, dtype, device and layout."""
    if node.op != "call_method" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target not in _VIEWS and node.target not in _CONVERSIONS:
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or node.kwargs.get("copy"):
        return False
    return (
        before.dtype is after.dtype
        and before.device == after.device
        and _known_equal(before.shape, after.shape)
        and _known_equal(before.stride(), after.stride())
    )


def _known_equal(left: Any, right: Any) -> bool:
    """Whether sizes are the same expressions; nothing is guarded on."""
    return [_expression(size) for size in left] == [_expression(size) for size in right]


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
