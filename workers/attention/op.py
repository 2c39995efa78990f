"""``torch.ops.warmgraph.attention``: attention as one opaque op, the point where graphs are split.

The op takes what the compiled code computes and nothing else; backend, metadata and caches come from the
forward context, so that their shapes never enter a graph. Registered through ``torch.library.Library``,
because ``torch.library.custom_op`` imports the compiler.

``rope_attention`` is the same op with the norms and the rotation of queries and keys inside. Models do not call it;
a fusion pass puts it in place where the backend wants it.

Shape suffixes: T = tokens of the batch (padded), H = query heads, K = KV heads, D = head size, P = positions.
"""

from __future__ import annotations

import torch

from workers.attention.base import Rope
from workers.graphs.context import get_forward_context

# torch.library carries no annotations.
_LIBRARY = torch.library.Library("warmgraph", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, int layer) -> ()"
_ROPE_SCHEMA = (
    "rope_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, int layer, Tensor positions, Tensor cos_sin_cache,"
    " Tensor? q_norm, Tensor? k_norm, float eps) -> ()"
)
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]
_LIBRARY.define(_ROPE_SCHEMA)  # type: ignore[no-untyped-call]


def _attention(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, out_THD: torch.Tensor, layer: int
) -> None:
    """Write k and v to the cache of ``layer`` and attention's result to ``out_THD``.

    ``v_TKD`` is usually a strided view of the fused projection. In a profiling run (no metadata) the result
    is zeros and no cache is touched.
    """
    context = get_forward_context()
    if context.attn_metadata is None:
        out_THD.zero_()
        return
    metadata = context.metadata_of(layer)
    context.attn_backend.forward(q_THD, k_TKD, v_TKD, context.kv_caches[layer], metadata, out_THD)


def _rope_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    out_THD: torch.Tensor,
    layer: int,
    positions_T: torch.Tensor,
    cos_sin_cache_PD: torch.Tensor,
    q_norm_D: torch.Tensor | None,
    k_norm_D: torch.Tensor | None,
    eps: float,
) -> None:
    """:func:`_attention` of queries and keys that have yet to be normalised (with norm weights) and rotated."""
    context = get_forward_context()
    if context.attn_metadata is None:
        out_THD.zero_()
        return
    rope = Rope(positions_T, cos_sin_cache_PD, q_norm_D, k_norm_D, eps)
    kv_cache, metadata = context.kv_caches[layer], context.metadata_of(layer)
    context.attn_backend.forward_rope(q_THD, k_TKD, v_TKD, kv_cache, metadata, out_THD, rope)


def _fake(*args: object) -> None:
    """For tracing: nothing is returned, and nothing about the mutated tensor changes."""


_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("rope_attention", _rope_attention, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY._register_fake("attention", _fake)  # type: ignore[no-untyped-call]
_LIBRARY._register_fake("rope_attention", _fake)  # type: ignore[no-untyped-call]
