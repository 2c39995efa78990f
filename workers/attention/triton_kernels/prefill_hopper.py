# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""Varlen causal attention of prefills on Hopper: :mod:`prefill`'s tiles and grid, with its order of work spelt out.

Triton's own pipeline waits for each product of queries and keys before its softmax, so that matrix unit and ALUs take
turns. Here, as in FlashAttention-3, the product of the last tile's weights with its values runs during this tile's
softmax. Written in Gluon, Triton's lower level, where waits are explicit. Keys and values arrive by asynchronous
copies, ``STAGES`` tiles deep. Behind the barrier of an iteration its tiles have arrived for all warps, and all have
finished with those whose places are filled next.

Reference: Shah et al., "FlashAttention-3" (2024), the overlap within a warpgroup.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def find_request(query_start_ptr, tile, num_reqs, BLOCK_Q: gl.constexpr, SEARCH: gl.constexpr):
    """As in :mod:`prefill`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    lanes = gl.arange(0, SEARCH, layout)
    count = 0
    for first in range(0, num_reqs, SEARCH):
        candidates = first + lanes
        starts = gl.load(query_start_ptr + candidates, mask=candidates < num_reqs, other=0)
        owned = (starts // BLOCK_Q + candidates <= tile) & (candidates < num_reqs)
        count += gl.sum(owned.to(gl.int32), 0)
    return count - 1


@gluon.jit
def load_queries(
    heads,
    live,
    positions,
    cos_sin_ptr,
    norm_ptr,
    HEAD_DIM: gl.constexpr,
    ROPE: gl.constexpr,
    NORM_EPS: gl.constexpr,
    layout: gl.constexpr,
):
    """``[M, HEAD_DIM]`` of the heads that start at ``heads`` ``[M, 1]``, with the arithmetic of ``rope.load_heads``.

    A head's two halves are loaded by themselves, so that each value, cosine and sine is read once.
    """
    HALF: gl.constexpr = HEAD_DIM // 2
    dims = gl.arange(0, HALF, gl.SliceLayout(0, layout))[None, :]
    x = gl.load(heads + dims, mask=live, other=0.0)
    y = gl.load(heads + HALF + dims, mask=live, other=0.0)
    if ROPE > 0:
        x32 = x.to(gl.float32)
        y32 = y.to(gl.float32)
        if ROPE == 2:
            square = gl.sum(x32 * x32, 1) + gl.sum(y32 * y32, 1)
            inverse_rms = gl.rsqrt(square / HEAD_DIM + NORM_EPS)[:, None]
            x_weight = gl.load(norm_ptr + dims).to(gl.float32)
            y_weight = gl.load(norm_ptr + HALF + dims).to(gl.float32)
            x32 = (x_weight * (x32 * inverse_rms)).to(x.dtype).to(gl.float32)
            y32 = (y_weight * (y32 * inverse_rms)).to(x.dtype).to(gl.float32)
        row = cos_sin_ptr + positions * HEAD_DIM + dims
        cos = gl.load(row)
        sin = gl.load(row + HALF)
        first = (x32 * cos - y32 * sin).to(x.dtype)
        y = (y32 * cos + x32 * sin).to(x.dtype)
        x = first
    return gl.join(x, y).permute(0, 2, 1).reshape(x.shape[0], HEAD_DIM)


@gluon.jit
def load_blocks(table_row, positions, high, PAGE: gl.constexpr):
    """Blocks of the cache that hold these positions; 0 from ``high`` on."""
    return gl.load(table_row + positions // PAGE, mask=positions < high, other=0)


@gluon.jit
def fetch(
    smem, cache_ptr, blocks, positions, dims, high, PLANE: gl.constexpr, PAGE: gl.constexpr, HEAD_DIM: gl.constexpr
):
    """Begin to copy a tile of keys or values; zeros from ``high`` on."""
    cells = blocks.to(gl.int64) * (2 * PLANE) + (positions % PAGE) * HEAD_DIM
    pointers = cache_ptr + cells[:, None] + dims[None, :]
    async_copy.async_copy_global_to_shared(smem, pointers, mask=(positions < high)[:, None])


@gluon.jit
def fold(scores, running_max, running_sum, positions, query_positions, QK_SCALE: gl.constexpr, MASKED: gl.constexpr):
    """One tile's softmax: weights, the new maximum and sum of each row, and what earlier sums are to be scaled by."""
    if MASKED:
        scores = gl.where(positions[None, :] <= query_positions[:, None], scores, float("-inf"))
    new_max = gl.maximum(running_max, gl.max(scores, 1) * QK_SCALE)
    weights = gl.exp2(scores * QK_SCALE - new_max[:, None])
    rescale = gl.exp2(running_max - new_max)
    return weights, new_max, running_sum * rescale + gl.sum(weights, 1), rescale


@gluon.jit(
    do_not_specialize=["num_reqs", "last_rows_only", "table_stride"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_ptr", "positions_ptr"],
)
def hopper_prefill_kernel(
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
    QK_SCALE: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SEARCH: gl.constexpr,
    ROPE: gl.constexpr,
    NORM_EPS: gl.constexpr,
):
    """Program (KV head, query tile). Requests with one token are left to the decode kernel.

    Args:
        last_rows_only: Whether all programs but those with a request's last token leave at once.
    """
    BLOCK_Q: gl.constexpr = BLOCK_M // GROUP
    PLANE: gl.constexpr = NUM_KV_HEADS * PAGE * HEAD_DIM
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    half_rows: gl.constexpr = gl.BlockedLayout([1, 8], [512 // HEAD_DIM, HEAD_DIM // 16], [WARPS, 1], [1, 0])
    full_rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [WARPS, 1], [1, 0])
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    score_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], dtype)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], dtype)

    head = gl.program_id(0)
    # Long tiles are those late in a request; starting them first keeps the tail of the launch short.
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    request = find_request(query_start_ptr, tile, num_reqs, BLOCK_Q, SEARCH)
    query_start = gl.load(query_start_ptr + request)
    query_len = gl.load(query_start_ptr + request + 1) - query_start
    first = (tile - (query_start // BLOCK_Q + request)) * BLOCK_Q
    if (query_len <= 1) | (first >= query_len):
        return
    if (last_rows_only != 0) & (first + BLOCK_Q < query_len):
        return
    context = gl.load(seq_lens_ptr + request) - query_len  # computed before this step
    high = context + gl.minimum(first + BLOCK_Q, query_len)
    # Keys up to the first query's own position are visible to every query of the tile.
    num_unmasked = (context + first + 1) // BLOCK_N
    num_tiles = (high + BLOCK_N - 1) // BLOCK_N

    keys_ptr = cache_ptr + head * (PAGE * HEAD_DIM)
    values_ptr = keys_ptr + PLANE
    table_row = block_table_ptr + request.to(gl.int64) * table_stride
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], kv_layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], kv_layout)
    offsets = gl.arange(0, BLOCK_N, gl.SliceLayout(1, full_rows))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, full_rows))

    # Copies run ahead: group i brings keys of tile i + STAGES - 1 and values of the tile before that.
    blocks = load_blocks(table_row, offsets, high, PAGE)
    fetch(k_smem.index(0), keys_ptr, blocks, offsets, dims, high, PLANE, PAGE, HEAD_DIM)
    async_copy.commit_group()
    next_blocks = load_blocks(table_row, BLOCK_N + offsets, high, PAGE)
    for ahead in gl.static_range(1, STAGES):
        before = (ahead - 1) * BLOCK_N + offsets
        fetch(v_smem.index(ahead - 1), values_ptr, blocks, before, dims, high, PLANE, PAGE, HEAD_DIM)
        blocks = next_blocks
        fetch(k_smem.index(ahead), keys_ptr, blocks, before + BLOCK_N, dims, high, PLANE, PAGE, HEAD_DIM)
        async_copy.commit_group()
        next_blocks = load_blocks(table_row, (ahead + 1) * BLOCK_N + offsets, high, PAGE)

    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, half_rows))
    tokens = first + rows // GROUP
    live = ((rows < BLOCK_Q * GROUP) & (tokens < query_len))[:, None]
    token_rows = (query_start + tokens).to(gl.int64)[:, None]
    positions = token_rows
    if ROPE > 0:
        positions = gl.load(positions_ptr + token_rows, mask=live, other=0)
    q = load_queries(
        q_ptr + token_rows * q_stride + (head * GROUP + rows % GROUP)[:, None] * HEAD_DIM, live,
        positions, cos_sin_ptr, q_norm_ptr, HEAD_DIM, ROPE, NORM_EPS, half_rows,
    )  # fmt: skip
    q_smem = gl.allocate_shared_memory(dtype, [BLOCK_M, HEAD_DIM], q_layout, q)
    # The matrix unit reads through another path than stores take.
    fence_async_shared()

    query_positions = context + first + gl.arange(0, BLOCK_M, score_rows) // GROUP
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
    no_scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, scores_layout)
    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, acc_layout)
    running_max = gl.full([BLOCK_M], float("-inf"), gl.float32, score_rows)
    running_sum = gl.zeros([BLOCK_M], gl.float32, score_rows)

    async_copy.wait_group(STAGES - 1)
    gl.thread_barrier()
    fence_async_shared()
    scores = warpgroup_mma(q_smem, k_smem.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    weights, running_max, running_sum, _ = fold(
        scores, running_max, running_sum, columns, query_positions, QK_SCALE, MASKED=True
    )

    slot = 1  # of this tile's keys; the values of the tile before are one behind
    for part in gl.static_range(2):
        if part == 0:
            begin = 1
            end = gl.maximum(num_unmasked, 1)
        else:
            begin = gl.maximum(num_unmasked, 1)
            end = num_tiles
        for index in range(begin, end):
            async_copy.wait_group(STAGES - 2)
            gl.thread_barrier()
            fence_async_shared()
            last_slot = gl.where(slot == 0, STAGES - 1, slot - 1)
            operand = gl.convert_layout(weights.to(dtype), weights_layout)
            scores = warpgroup_mma(q_smem, k_smem.index(slot).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            product = warpgroup_mma(operand, v_smem.index(last_slot), acc, is_async=True)
            # Keys of the tile before are done with, and so are values of the one before that.
            far = (index + STAGES - 2) * BLOCK_N + offsets
            far_slot = gl.where(last_slot == 0, STAGES - 1, last_slot - 1)
            fetch(v_smem.index(far_slot), values_ptr, blocks, far, dims, high, PLANE, PAGE, HEAD_DIM)
            blocks = next_blocks
            far += BLOCK_N
            fetch(k_smem.index(last_slot), keys_ptr, blocks, far, dims, high, PLANE, PAGE, HEAD_DIM)
            async_copy.commit_group()
            next_blocks = load_blocks(table_row, far + BLOCK_N, high, PAGE)

            scores = warpgroup_mma_wait(1, [scores])
            weights, running_max, running_sum, rescale = fold(
                scores, running_max, running_sum, index * BLOCK_N + columns, query_positions, QK_SCALE, MASKED=part == 1
            )
            acc, operand = warpgroup_mma_wait(0, [product, operand])
            acc = acc * gl.convert_layout(rescale, acc_rows)[:, None]
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)

    async_copy.wait_group(0)
    gl.thread_barrier()
    fence_async_shared()
    last_slot = gl.where(slot == 0, STAGES - 1, slot - 1)
    operand = gl.convert_layout(weights.to(dtype), weights_layout)
    product = warpgroup_mma(operand, v_smem.index(last_slot), acc, is_async=True)
    acc, operand = warpgroup_mma_wait(0, [product, operand])
    acc = acc / gl.convert_layout(running_sum, acc_rows)[:, None]

    q_smem.store(acc.to(dtype))
    result = q_smem.load(full_rows)
    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, full_rows))
    tokens = first + rows // GROUP
    live = (rows < BLOCK_Q * GROUP) & (tokens < query_len)
    token_rows = (query_start + tokens).to(gl.int64)[:, None]
    within = (head * GROUP + rows % GROUP)[:, None] * HEAD_DIM + dims[None, :]
    gl.store(out_ptr + token_rows * out_stride + within, result, mask=live[:, None])
