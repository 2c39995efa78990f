# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""Scatters one step's keys and values into the paged cache; knows slots, not requests.

Cache layout: ``[B, 2, K, S, D]`` (blocks, keys then values, KV heads, block size, head size), so that what one
(block, head) holds is one contiguous run of ``S * D`` elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.attention.triton_kernels.rope import load_heads


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["slot_mapping_ptr", "positions_ptr"],
)
def cache_write_kernel(
    k_ptr,
    v_ptr,
    out_ptr,
    cache_ptr,
    slot_mapping_ptr,
    k_stride,
    v_stride,
    out_stride,
    num_tokens,
    positions_ptr,
    cos_sin_ptr,
    k_norm_ptr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROPE: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """Program (head, tile) writes ``BLOCK_T`` tokens of one KV head.

    A token whose slot is negative is padding: nothing is written to the cache, and its rows of the output are
    zeroed here, because no attention program visits them.
    """
    head = tl.program_id(0)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    dims = tl.arange(0, HEAD_DIM_PADDED)[None, :]
    in_head = dims < HEAD_DIM
    inside = tokens < num_tokens
    slots = tl.load(slot_mapping_ptr + tokens, mask=inside, other=-1)
    live = (slots >= 0)[:, None] & in_head

    positions = tokens
    if ROPE > 0:
        positions = tl.load(positions_ptr + tokens, mask=inside, other=0)
    k = load_heads(
        k_ptr + tokens[:, None] * k_stride + head * HEAD_DIM, dims, live,
        positions[:, None], cos_sin_ptr, k_norm_ptr, HEAD_DIM, ROPE, NORM_EPS,
    )  # fmt: skip
    v = tl.load(v_ptr + tokens[:, None] * v_stride + head * HEAD_DIM + dims, mask=live, other=0.0)

    plane = NUM_KV_HEADS * PAGE * HEAD_DIM
    target = (slots // PAGE) * (2 * plane) + head * (PAGE * HEAD_DIM) + (slots % PAGE) * HEAD_DIM
    tl.store(cache_ptr + target[:, None] + dims, k, mask=live)
    tl.store(cache_ptr + plane + target[:, None] + dims, v, mask=live)

    padding = (inside & (slots < 0))[:, None] & in_head
    zeros = tl.zeros([BLOCK_T, HEAD_DIM_PADDED], out_ptr.dtype.element_ty)
    for g in tl.static_range(GROUP):
        rows = tokens[:, None] * out_stride + (head * GROUP + g) * HEAD_DIM + dims
        tl.store(out_ptr + rows, zeros, mask=padding)
