# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""Varlen causal attention of prefills and prompt chunks, FlashAttention-2 style, over a paged cache.

The step's own keys and values are in the cache already (the write kernel ran first), so cached context and new tokens
are read the same way, through the block table. A tile of queries packs the heads of one KV group: ``BLOCK_M`` rows
are ``BLOCK_Q`` tokens times ``GROUP`` heads, so that each key tile is read once per group.

The launch grid depends on padded shapes only: with T tokens and R requests there are at most ``T // BLOCK_Q + R``
query tiles. Request r owns the tiles from ``query_start[r] // BLOCK_Q + r`` on, a number that strictly increases, so
a program finds its request by counting. Cache layout as in :mod:`workers.attention.triton_kernels.cache_write`.

Reference: Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.attention.triton_kernels.decode import load_blocks
from workers.attention.triton_kernels.rope import load_heads


@triton.jit
def find_request(query_start_ptr, tile, num_reqs, BLOCK_Q: tl.constexpr, SEARCH: tl.constexpr):
    """The request that owns query tile ``tile``: the last r with ``query_start[r] // BLOCK_Q + r <= tile``."""
    lanes = tl.arange(0, SEARCH)
    count = 0
    for first in range(0, num_reqs, SEARCH):
        candidates = first + lanes
        starts = tl.load(query_start_ptr + candidates, mask=candidates < num_reqs, other=0)
        owned = (starts // BLOCK_Q + candidates <= tile) & (candidates < num_reqs)
        count += tl.sum(owned.to(tl.int32), 0)
    return count - 1


@triton.jit
def attend_tiles(
    acc,
    running_max,
    running_sum,
    q,
    query_positions,
    cache_head_ptr,
    table_row,
    low,
    high,
    QK_SCALE: tl.constexpr,
    PLANE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold keys ``[low, high)`` into the online softmax; without ``MASKED`` every query sees all of them."""
    dims = tl.arange(0, HEAD_DIM_PADDED)
    offsets = tl.arange(0, BLOCK_N)
    # Fetched one tile ahead and carried over, as in the decode kernel.
    blocks = load_blocks(table_row, low, high, PAGE, BLOCK_N)
    for start in range(low, high, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        positions = start + offsets
        valid = positions < high
        cells = blocks.to(tl.int64) * (2 * PLANE) + (positions % PAGE) * HEAD_DIM
        blocks = load_blocks(table_row, start + BLOCK_N, high, PAGE, BLOCK_N)
        keys = cache_head_ptr + cells[:, None] + dims[None, :]
        # Cells beyond the context may hold anything, NaN included, and 0 * NaN would spoil the sum: load zeros.
        if MASKED:
            loads = valid[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(keys, mask=loads, other=0.0)
            v = tl.load(keys + PLANE, mask=loads, other=0.0)
        elif HEAD_DIM != HEAD_DIM_PADDED:
            k = tl.load(keys, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(keys + PLANE, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(keys)
            v = tl.load(keys + PLANE)
        scores = tl.dot(q, tl.trans(k))
        if MASKED:
            visible = valid[None, :] & (positions[None, :] <= query_positions[:, None])
            if WINDOW > 0:
                visible = visible & (positions[None, :] > query_positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1) * QK_SCALE)
        safe_max = new_max
        if WINDOW > 0:  # a row may not have met its first visible key yet
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        # Scaled here, not above: one fused multiply-add per score.
        weights = tl.exp2(scores * QK_SCALE - safe_max[:, None])
        rescale = tl.exp2(running_max - safe_max)
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])
        running_max = new_max
    return acc, running_max, running_sum


@triton.jit(
    do_not_specialize=["num_reqs", "last_rows_only", "table_stride"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_ptr", "positions_ptr"],
)
def prefill_kernel(
    out_ptr,
    q_ptr,
    cache_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_ptr,
    out_stride,
    q_stride,
    table_stride,
    num_reqs,
    last_rows_only,
    positions_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    QK_SCALE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
    ROPE: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """Program (KV head, query tile). Requests with one token are left to the decode kernel.

    Args:
        last_rows_only: Whether all programs but those with a request's last token leave at once.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0)
    # Long tiles are those late in a request; starting them first keeps the tail of the launch short.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    request = find_request(query_start_ptr, tile, num_reqs, BLOCK_Q, SEARCH)
    query_start = tl.load(query_start_ptr + request)
    query_len = tl.load(query_start_ptr + request + 1) - query_start
    first = (tile - (query_start // BLOCK_Q + request)) * BLOCK_Q
    if (query_len <= 1) | (first >= query_len):
        return
    if (last_rows_only != 0) & (first + BLOCK_Q < query_len):
        return
    context = tl.load(seq_lens_ptr + request) - query_len  # computed before this step

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    tokens = first + rows // GROUP
    live = ((rows < BLOCK_Q * GROUP) & (tokens < query_len))[:, None] & (dims < HEAD_DIM)[None, :]
    head_rows = (head * GROUP + rows % GROUP)[:, None] * HEAD_DIM
    within = head_rows + dims[None, :]
    token_rows = (query_start + tokens).to(tl.int64)[:, None]
    positions = token_rows
    if ROPE > 0:
        positions = tl.load(positions_ptr + token_rows, mask=(tokens < query_len)[:, None], other=0)
    q = load_heads(
        q_ptr + token_rows * q_stride + head_rows, dims[None, :], live,
        positions, cos_sin_ptr, q_norm_ptr, HEAD_DIM, ROPE, NORM_EPS,
    )  # fmt: skip
    own_rows = out_ptr + token_rows * out_stride + within
    if ROPE > 0:
        # Queries fresh from a load go to shared memory once; computed ones would be fetched into registers before
        # every product. The output's rows are this program's own, and free until its end.
        tl.store(own_rows, q, mask=live)
        tl.debug_barrier()
        q = tl.load(own_rows, mask=live, other=0.0)

    plane: tl.constexpr = NUM_KV_HEADS * PAGE * HEAD_DIM
    cache_head_ptr = cache_ptr + head * (PAGE * HEAD_DIM)
    table_row = block_table_ptr + request.to(tl.int64) * table_stride
    query_positions = context + tokens
    high = context + tl.minimum(first + BLOCK_Q, query_len)
    if WINDOW > 0:
        unmasked_high = tl.maximum(context + first + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
        low = unmasked_high
    else:
        # Keys up to the first query's own position are visible to every query of the tile.
        unmasked_high = (context + first + 1) // BLOCK_N * BLOCK_N
        low = 0

    acc = tl.zeros([BLOCK_M, HEAD_DIM_PADDED], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    if WINDOW == 0:
        acc, running_max, running_sum = attend_tiles(
            acc,
            running_max,
            running_sum,
            q,
            query_positions,
            cache_head_ptr,
            table_row,
            low,
            unmasked_high,
            QK_SCALE,
            plane,
            HEAD_DIM,
            HEAD_DIM_PADDED,
            PAGE,
            WINDOW,
            BLOCK_N,
            False,
        )
    acc, running_max, running_sum = attend_tiles(
        acc,
        running_max,
        running_sum,
        q,
        query_positions,
        cache_head_ptr,
        table_row,
        unmasked_high,
        high,
        QK_SCALE,
        plane,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        PAGE,
        WINDOW,
        BLOCK_N,
        True,
    )
    result = acc / tl.where(running_sum > 0.0, running_sum, 1.0)[:, None]
    tl.store(own_rows, result.to(out_ptr.dtype.element_ty), mask=live)
