"""Rotates queries and keys, and normalises them where the model does, in one kernel instead of one per tensor.

Both are slices of one projection, which a compiler that sees two tensors of different sizes does not put together.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

from torch import fx

from workers.compile import fused
from workers.compile.composites import replace_call
from workers.compile.passes.manager import GraphPass
from workers.compile.passes.noop import remove_dead
from workers.compile.split import tensor_of
from workers.kernels import reference


@dataclasses.dataclass(frozen=True, slots=True)
class _Slice:
    """Heads cut out of a projection: ``split(...)[index].view(tokens, num_heads, head_dim)``."""

    projection: fx.Node
    sizes: tuple[int, ...]
    index: int
    num_heads: int
    head_dim: int


class QkRope(GraphPass):
    """See the module."""

    name: ClassVar[str] = "qk_rope"

    def run(self, graph: fx.Graph) -> int:
        """Counts the layers."""
        num_matches = 0
        for node in graph.find_nodes(op="call_function", target=reference.apply_rope):
            args = _match(node)
            if args is not None:
                replace_call(node, fused.rotate_qk, *args)
                num_matches += 1
        remove_dead(graph)
        return num_matches


def _match(rope: fx.Node) -> tuple[Any, ...] | None:
    """Arguments of :func:`fused.rotate_qk`, or None if queries and keys do not come from one projection."""
    q, k, positions, cache = rope.args
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    norms: tuple[Any, Any] | None = None
    eps: Any = 0.0
    if q.target is reference.rms_norm and k.target is reference.rms_norm and q.args[2] == k.args[2]:
        norms, eps = (q.args[1], k.args[1]), q.args[2]
        q, k = q.args[0], k.args[0]
    q_slice, k_slice = _slice(q), _slice(k)
    if q_slice is None or k_slice is None or q_slice.projection is not k_slice.projection:
        return None
    if (q_slice.index, k_slice.index) != (0, 1) or q_slice.head_dim != k_slice.head_dim:
        return None
    head_sizes = (q_slice.num_heads, k_slice.num_heads, q_slice.head_dim)
    if q_slice.sizes[:2] != (head_sizes[0] * head_sizes[2], head_sizes[1] * head_sizes[2]):
        return None
    return (q_slice.projection, head_sizes, positions, cache, norms, eps)


def _slice(view: Any) -> _Slice | None:
    if not isinstance(view, fx.Node) or view.op != "call_method" or view.target != "view":
        return None
    item, value = view.args[0], tensor_of(view)
    if not isinstance(item, fx.Node) or item.target is not operator.getitem or value is None or value.dim() != 3:
        return None
    split, index = item.args
    if not isinstance(split, fx.Node) or split.op != "call_method" or split.target != "split":
        return None
    projection, sizes = split.args[:2]
    dim = split.kwargs.get("dim", split.args[2] if len(split.args) > 2 else 0)
    if not isinstance(projection, fx.Node) or not isinstance(sizes, list | tuple) or dim != -1:
        return None
    assert isinstance(index, int)
    cuts: Any = tuple(sizes)
    return _Slice(projection, cuts, index, int(value.shape[1]), int(value.shape[2]))
