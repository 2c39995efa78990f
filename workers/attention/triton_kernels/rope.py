# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""Loads heads of queries and keys, normalised and rotated on the way where the kernel was made for that.

What the attention kernels take is then the bare projection, and no kernel has to go before them. The arithmetic, its
roundings included, is that of :mod:`workers.kernels.reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Values of a kernel's ``ROPE``: heads are ready, are to be rotated, or to be normalised and then rotated.
NO_ROPE, ROTATE, NORM_AND_ROTATE = 0, 1, 2


@triton.jit
def load_heads(
    heads,
    dims,
    mask,
    positions,
    cos_sin_ptr,
    norm_ptr,
    HEAD_DIM: tl.constexpr,
    ROPE: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """Elements ``dims`` of the heads that start at ``heads``, in the dtype of memory.

    Args:
        heads: Pointers that broadcast with ``dims``, the last axis.
        positions: int64, the row of the cos and sin table for each head; broadcasts as ``heads`` does.
        norm_ptr: ``[HEAD_DIM]`` weight of the RMS norm, if ``ROPE`` asks for one.
    """
    x = tl.load(heads + dims, mask=mask, other=0.0)
    if ROPE > 0:
        in_head = dims < HEAD_DIM
        is_first = dims < HEAD_DIM // 2
        # Dimension i turns with i + D/2. The partner's load finds its line in the cache.
        partners = tl.where(is_first, dims + HEAD_DIM // 2, dims - HEAD_DIM // 2)
        frequencies = tl.minimum(dims, partners)
        y = tl.load(heads + partners, mask=mask, other=0.0)
        x32 = x.to(tl.float32)
        y32 = y.to(tl.float32)
        if ROPE == 2:
            inverse_rms = tl.rsqrt(tl.sum(x32 * x32, -1, keep_dims=True) / HEAD_DIM + NORM_EPS)
            x_weight = tl.load(norm_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
            y_weight = tl.load(norm_ptr + partners, mask=in_head, other=0.0).to(tl.float32)
            x32 = (x_weight * (x32 * inverse_rms)).to(x.dtype).to(tl.float32)
            y32 = (y_weight * (y32 * inverse_rms)).to(x.dtype).to(tl.float32)
        row = cos_sin_ptr + positions * HEAD_DIM + frequencies
        cos = tl.load(row, mask=in_head, other=0.0)
        sin = tl.load(row + HEAD_DIM // 2, mask=in_head, other=0.0)
        x = (x32 * cos + tl.where(is_first, -y32, y32) * sin).to(x.dtype)
    return x
