# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""Split-KV decode over a paged cache: one query token per request, flash-decoding style.

One program reads one chunk of one request's context for one KV head and serves all query heads of that group, so
every cached key and value is read once. The program of chunk 0 also takes the step's own key and value, straight
from the projections, and writes them to the cache: a decode step needs no separate write kernel and reads no cell
that it writes. Where a request has several chunks, each leaves an unnormalised partial result, and the program that
finishes last combines them (an arrival counter per request and head).

The launch grid depends on padded shapes only; chunks are cut on the device, from the lengths found there, so a
captured graph stays right for any later lengths. The grid has programs for the first ``num_splits`` chunks of each
row, few enough to be cheap where contexts are short, and a fixed number of *overflow* programs that share out the
remaining chunks of contexts longer than ``num_splits * max_chunk``, wherever those are.

Softmax runs in base 2 (``QK_SCALE`` carries log2 e). The cache is laid out as in
:mod:`workers.attention.triton_kernels.cache_write`.

References: Dao et al., "Flash-Decoding for long-context inference" (2023); the online softmax of Milakov and
Gimelshein (2018); arrival counters as in Stream-K (Osama et al., 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.attention.triton_kernels.chunks import (
    context_begin,
    find_overflow,
    overflow_before,
    overflow_work,
    row_work,
)
from workers.attention.triton_kernels.partials import arrive, merge_chunks, store_partial
from workers.attention.triton_kernels.rope import load_heads
from workers.kernels.overlap import wait_for_kernel_before


@triton.jit
def load_blocks(table_row, start, high, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Numbers of the blocks that hold positions ``start`` to ``start + BLOCK_N``, as far as they lie below ``high``."""
    if PAGE % BLOCK_N == 0:  # the tile lies inside one block
        blocks = tl.load(table_row + start // PAGE, mask=start < high, other=0)
    else:
        positions = start + tl.arange(0, BLOCK_N)
        blocks = tl.load(table_row + positions // PAGE, mask=positions < high, other=0)
    return blocks


@triton.jit
def attend_chunk(
    q,
    table_row,
    cache_head_ptr,
    low,
    high,
    last,
    QK_SCALE: tl.constexpr,
    PLANE: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax of one group's queries over cached positions ``[low, high)``: accumulator, maximum, sum."""
    running_max = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    running_sum = tl.zeros([GROUP_PADDED], tl.float32)
    acc = tl.zeros([GROUP_PADDED, HEAD_DIM_PADDED], tl.float32)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    offsets = tl.arange(0, BLOCK_N)
    # Block numbers are fetched one tile ahead and carried over: loaded in the iteration that needs them, they would
    # stand between the compiler's pipeline and the loads of keys and values, and halve its depth.
    blocks = load_blocks(table_row, low, high, PAGE, BLOCK_N)
    for start in range(low, high, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        positions = start + offsets
        valid = positions < high
        if WINDOW > 0:
            valid = valid & (positions > last - WINDOW)
        cells = blocks.to(tl.int64) * (2 * PLANE) + (positions % PAGE) * HEAD_DIM
        blocks = load_blocks(table_row, start + BLOCK_N, high, PAGE, BLOCK_N)
        keys = cache_head_ptr + cells[:, None] + dims[None, :]
        # Masked cells cost no bandwidth; and they may hold anything, NaN included, whose product with 0 is NaN.
        loads = valid[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys, mask=loads, other=0.0)
        v = tl.load(keys + PLANE, mask=loads, other=0.0)
        scores = tl.where(valid[None, :], tl.dot(q, tl.trans(k)) * QK_SCALE, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        safe_max = new_max
        if WINDOW == 1:  # the cached context is out of sight altogether
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - safe_max[:, None])
        rescale = tl.exp2(running_max - safe_max)
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])
        running_max = new_max
    return acc, running_max, running_sum


@triton.jit(
    do_not_specialize=["num_rows", "grid_rows", "num_splits", "min_chunk", "max_chunk", "table_stride"],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "seq_lens_ptr",
        "query_start_ptr",
        "slot_mapping_ptr",
        "positions_ptr",
    ],
)
def decode_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cache_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_ptr,
    slot_mapping_ptr,
    partial_acc_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    counter_ptr,
    out_stride,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    num_rows,
    grid_rows,
    num_splits,
    min_chunk,
    max_chunk,
    positions_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    QK_SCALE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    GROUP_MERGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGE_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    GRID_SLOTS: tl.constexpr,
    OVERFLOW_CHUNKS: tl.constexpr,
    MIXED: tl.constexpr,
    OVERLAP_LAUNCH: tl.constexpr,
    ROPE: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """Program (KV head, row, split); rows at and beyond ``grid_rows`` are overflow programs.

    Rows are tokens of a pure decode, or requests of a mixed batch (``MIXED``). In a mixed batch, rows that do not
    bring exactly one token leave at once; they belong to the prefill kernel. In a pure decode, rows of length 0
    (padding) get zeros.

    Args:
        num_rows: Rows of ``seq_lens``; a grid row beyond them is padding.
        positions_ptr: With the three after it, what ``ROPE`` needs (:mod:`workers.attention.triton_kernels.rope`).
    """
    head = tl.program_id(0)
    grid_row = tl.program_id(1)
    split = tl.program_id(2)
    if OVERLAP_LAUNCH:
        wait_for_kernel_before()
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    in_head = dims < HEAD_DIM
    in_group = (heads < GROUP)[:, None] & in_head[None, :]
    head_rows = (head * GROUP + heads)[:, None] * HEAD_DIM
    within = head_rows + dims[None, :]
    plane: tl.constexpr = NUM_KV_HEADS * PAGE * HEAD_DIM
    cache_head_ptr = cache_ptr + head * (PAGE * HEAD_DIM)

    # What this program does, as a range of items: one chunk of its row, or every so many of the overflow chunks.
    is_overflow = grid_row >= grid_rows
    if is_overflow:
        first_item = (grid_row - grid_rows) * num_splits + split
        step = (tl.num_programs(1) - grid_rows) * num_splits
        chunk, end_item = overflow_work(
            num_rows, num_splits, max_chunk, seq_lens_ptr, query_start_ptr,
            WINDOW, BLOCK_N, MIXED, OVERFLOW_CHUNKS, ROW_TILE,
        )  # fmt: skip
    else:
        first_item = split
        step = 1
        chunk, num_chunks = row_work(
            grid_row, num_rows, num_splits, min_chunk, max_chunk, seq_lens_ptr, query_start_ptr,
            WINDOW, BLOCK_N, MIXED, OVERFLOW_CHUNKS, ROW_TILE,
        )  # fmt: skip
        end_item = tl.minimum(num_chunks, split + 1)
        if not MIXED and (num_chunks == 0) & (split == 0):  # padding; in a mixed batch the cache write takes care of it
            zeros = tl.zeros([GROUP_PADDED, HEAD_DIM_PADDED], out_ptr.dtype.element_ty)
            tl.store(out_ptr + grid_row.to(tl.int64) * out_stride + within, zeros, mask=in_group)

    for item in range(first_item, end_item, step):
        row = grid_row
        index = item
        before = 0
        if is_overflow:
            row, before = find_overflow(
                item, num_rows, num_splits, max_chunk, chunk, seq_lens_ptr, query_start_ptr,
                WINDOW, BLOCK_N, MIXED, ROW_TILE,
            )  # fmt: skip
            index = num_splits + item - before
        token = row
        if MIXED:
            token = tl.load(query_start_ptr + row)
        token = token.to(tl.int64)
        position = 0
        if ROPE > 0:
            position = tl.load(positions_ptr + token)
        q = load_heads(
            q_ptr + token * q_stride + head_rows, dims[None, :], in_group,
            position, cos_sin_ptr, q_norm_ptr, HEAD_DIM, ROPE, NORM_EPS,
        )  # fmt: skip
        last = tl.load(seq_lens_ptr + row) - 1  # position of the new token
        begin = context_begin(last, WINDOW, BLOCK_N)
        low = begin + index * chunk
        acc, running_max, running_sum = attend_chunk(
            q, block_table_ptr + row.to(tl.int64) * table_stride, cache_head_ptr,
            low, tl.minimum(low + chunk, last), last,
            QK_SCALE, plane, GROUP_PADDED, HEAD_DIM, HEAD_DIM_PADDED, PAGE, WINDOW, BLOCK_N,
        )  # fmt: skip

        if index == 0:  # chunk 0 takes the new token too, and puts it in the cache
            k_new = load_heads(
                k_ptr + token * k_stride + head * HEAD_DIM, dims, in_head,
                position, cos_sin_ptr, k_norm_ptr, HEAD_DIM, ROPE, NORM_EPS,
            )  # fmt: skip
            v_new = tl.load(v_ptr + token * v_stride + head * HEAD_DIM + dims, mask=in_head, other=0.0)
            slot = tl.load(slot_mapping_ptr + token)
            target = cache_head_ptr + (slot // PAGE) * (2 * plane) + (slot % PAGE) * HEAD_DIM + dims
            tl.store(target, k_new, mask=in_head & (slot >= 0))
            tl.store(target + plane, v_new, mask=in_head & (slot >= 0))
            score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * QK_SCALE
            new_max = tl.maximum(running_max, score)
            weight = tl.exp2(score - new_max)
            rescale = tl.exp2(running_max - new_max)
            running_sum = running_sum * rescale + weight
            acc = acc * rescale[:, None] + weight[:, None] * v_new.to(tl.float32)[None, :]
            running_max = new_max

        out_row = out_ptr + token * out_stride
        num_chunks = tl.maximum((last - begin + chunk - 1) // chunk, 1)
        if num_chunks == 1:
            tl.store(out_row + within, (acc / running_sum[:, None]).to(out_ptr.dtype.element_ty), mask=in_group)
        else:
            grid_slot = (row * NUM_KV_HEADS + head) * num_splits
            overflow_slot = GRID_SLOTS + head * OVERFLOW_CHUNKS + before
            slot = grid_slot + index
            if is_overflow:
                slot = GRID_SLOTS + head * OVERFLOW_CHUNKS + item
            store_partial(
                partial_acc_ptr, partial_max_ptr, partial_sum_ptr, slot,
                acc, running_max, running_sum, GROUP, GROUP_PADDED, HEAD_DIM, HEAD_DIM_PADDED,
            )  # fmt: skip
            if arrive(counter_ptr + row * NUM_KV_HEADS + head, num_chunks):
                if (num_chunks > num_splits) & (grid_row < grid_rows):
                    overflow_slot += overflow_before(
                        row, num_rows, num_splits, max_chunk, chunk, seq_lens_ptr, query_start_ptr,
                        WINDOW, BLOCK_N, MIXED, ROW_TILE,
                    )  # fmt: skip
                merge_chunks(
                    out_row + head * (GROUP * HEAD_DIM), partial_acc_ptr, partial_max_ptr, partial_sum_ptr,
                    grid_slot, overflow_slot, num_splits, num_chunks,
                    GROUP, HEAD_DIM, HEAD_DIM_PADDED, GROUP_MERGE, MERGE_TILE,
                )  # fmt: skip
