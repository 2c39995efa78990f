"""Moves the rotation of queries and keys, and their norms where the model has some, into the attention op.

An attention kernel loads every query and key anyway, and writes keys and values to the cache: rotating them on the way
costs it nothing that shows, and saves a kernel per layer, with its launch and its trip through memory. Only backends
that name ``warmgraph::rope_attention`` among their splitting ops do so.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from workers.compile.composites import set_example_value
from workers.compile.passes.manager import GraphPass
from workers.compile.passes.noop import remove_dead
from workers.compile.split import op_name, tensor_of
from workers.kernels import reference

_ATTENTION, _ROPE_ATTENTION = "warmgraph::attention", "warmgraph::rope_attention"


class RopeKvWrite(GraphPass):
    """See the module.

    Args:
        splitting_ops: Of the attention backend.
    """

    name: ClassVar[str] = "rope_kv_write"

    def __init__(self, splitting_ops: Sequence[str]) -> None:
        self._is_wanted = _ROPE_ATTENTION in splitting_ops

    def constants(self) -> dict[str, Any]:
        """Whether the backend takes queries and keys as they are."""
        return {"is_wanted": self._is_wanted}

    def run(self, graph: fx.Graph) -> int:
        """Counts the layers."""
        if not self._is_wanted:
            return 0
        num_matches = 0
        for rope in graph.find_nodes(op="call_function", target=reference.apply_rope):
            attention = _attention_of(rope)
            if attention is not None:
                _fuse(rope, attention)
                num_matches += 1
        remove_dead(graph)
        return num_matches


def _attention_of(rope: fx.Node) -> fx.Node | None:
    """The attention call that takes both results of a rotation, if nothing but it and its output buffer do."""
    results = {user.args[1]: user for user in rope.users if user.target is operator.getitem}
    if len(results) != len(rope.users) or set(results) != {0, 1}:
        return None
    calls = [user for user in results[1].users if op_name(user) == _ATTENTION]
    if len(calls) != 1 or len(results[1].users) != 1 or list(calls[0].args[:2]) != [results[0], results[1]]:
        return None
    others = [user for user in results[0].users if user is not calls[0]]
    if any(user.target is not torch.empty_like for user in others):
        return None
    return calls[0] if all(_has_dense_heads(head) for head in _before(rope)[:2]) else None


def _fuse(rope: fx.Node, attention: fx.Node) -> None:
    graph = attention.graph
    q, k, q_norm, k_norm, eps = _before(rope)
    rotated_q = attention.args[0]
    assert isinstance(rotated_q, fx.Node)
    for buffer in [user for user in rotated_q.users if user.target is torch.empty_like]:
        # Like the rotated queries, which were dense, and not like a slice of the projection.
        buffer.args, buffer.kwargs = (q,), {"memory_format": torch.contiguous_format}
    with graph.inserting_before(attention):
        fused = graph.call_function(
            torch.ops.warmgraph.rope_attention.default,
            (q, k, *attention.args[2:5], *rope.args[2:4], q_norm, k_norm, eps),
        )
    set_example_value(fused)
    graph.erase_node(attention)


def _before(rope: fx.Node) -> tuple[Any, Any, Any, Any, float]:
    """Queries and keys before rotation, and before their norms if both have one; the norms' weights and epsilon."""
    q, k = rope.args[:2]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    if q.target is reference.rms_norm and k.target is reference.rms_norm and q.args[2] == k.args[2]:
        eps: Any = q.args[2]
        return q.args[0], k.args[0], q.args[1], k.args[1], eps
    return q, k, None, None, 0.0


def _has_dense_heads(node: Any) -> bool:
    """Whether elements lie side by side in a head, and heads in a token, as kernels read them."""
    value = tensor_of(node) if isinstance(node, fx.Node) else None
    return value is not None and value.dim() == 3 and value.stride()[1:] == (value.shape[2], 1)
