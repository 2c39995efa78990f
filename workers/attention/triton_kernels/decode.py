# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""Split-KV decode over a paged cache: one query token per request, flash-decoding style.

One program reads one chunk of one request's context for one KV head and serves all query heads of that group, so
every cached key and value is read once. The program of chunk 0 also takes the step's own key and value, straight
from the projections, and writes them to the cache: a decode step needs no separate write kernel and reads no cell
that it writes. Where a request has several chunks, each leaves an unnormalised partial result, and the program that
finishes last combines them (an arrival counter per request and head); :func:`merge_kernel` does the same in a
launch of its own.

The launch grid depends on padded shapes only. Chunks are cut on the device, from the lengths found there, so a
captured graph stays right for any later lengths. Softmax runs in base 2 (``QK_SCALE`` carries log2 e). The cache
is laid out as in :mod:`workers.attention.triton_kernels.cache_write`.

References: Dao et al., "Flash-Decoding for long-context inference" (2023); the online softmax of Milakov and
Gimelshein (2018); arrival counters as in Stream-K (Osama et al., 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def context_chunks(
    last,
    num_splits,
    occupancy_splits,
    min_chunk,
    max_chunk,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """How the cached context ``[begin, last)`` of one request is cut.

    Aims at ``occupancy_splits`` chunks (what it takes to fill the device), of ``min_chunk`` to ``max_chunk``
    tokens, and never more than ``num_splits`` of them.

    Returns:
        First cached position that is read (a multiple of BLOCK_N), tokens per chunk (likewise), and the number of
        chunks (at least 1: the new token counts as part of the first).
    """
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(last + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    length = last - begin
    chunk = (length + occupancy_splits - 1) // occupancy_splits
    chunk = tl.minimum(tl.maximum(chunk, min_chunk), max_chunk)
    chunk = tl.maximum(chunk, (length + num_splits - 1) // num_splits)
    chunk = (chunk + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return begin, chunk, tl.maximum((length + chunk - 1) // chunk, 1)


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
def merge_chunks(
    out_ptr,
    partial_acc_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    first_slot,
    num_chunks,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    GROUP_MERGE: tl.constexpr,
    MERGE_TILE: tl.constexpr,
):
    """Combine a request's partial results for one KV head; ``out_ptr`` points at the group's first output element.

    With m_s, l_s, a_s the maximum, sum and accumulator of chunk s: out = sum(2^(m_s - m) a_s) / sum(2^(m_s - m) l_s).
    """
    chunks = tl.arange(0, MERGE_TILE)
    heads = tl.arange(0, GROUP_MERGE)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    running_max = tl.full([GROUP_MERGE], float("-inf"), tl.float32)
    running_sum = tl.zeros([GROUP_MERGE], tl.float32)
    acc = tl.zeros([GROUP_MERGE, HEAD_DIM_PADDED], tl.float32)
    for start in range(0, num_chunks, MERGE_TILE):
        rows = (first_slot + start + chunks)[:, None] * GROUP + heads[None, :]
        live = ((start + chunks) < num_chunks)[:, None] & (heads < GROUP)[None, :]
        # .cg reads from L2, where the other programs' stores are; this SM's L1 may hold an earlier step's lines.
        chunk_max = tl.load(partial_max_ptr + rows, mask=live, other=float("-inf"), cache_modifier=".cg")
        chunk_sum = tl.load(partial_sum_ptr + rows, mask=live, other=0.0, cache_modifier=".cg")
        chunk_acc = tl.load(
            partial_acc_ptr + rows[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=live[:, :, None] & (dims < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_max = tl.maximum(running_max, tl.max(chunk_max, 0))
        # Heads beyond GROUP never see a finite maximum; keep their exponent finite.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(chunk_max - safe_max[None, :])
        rescale = tl.exp2(running_max - safe_max)
        running_sum = running_sum * rescale + tl.sum(chunk_sum * weights, 0)
        acc = acc * rescale[:, None] + tl.sum(chunk_acc * weights[:, :, None], 0)
        running_max = new_max
    result = acc / tl.where(running_sum > 0.0, running_sum, 1.0)[:, None]
    tl.store(
        out_ptr + heads[:, None] * HEAD_DIM + dims[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=(heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :],
    )


@triton.jit(
    do_not_specialize=["num_rows", "num_splits", "occupancy_splits", "min_chunk", "max_chunk", "table_stride"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_ptr", "slot_mapping_ptr"],
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
    num_splits,
    occupancy_splits,
    min_chunk,
    max_chunk,
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
    MIXED: tl.constexpr,
    FUSED_MERGE: tl.constexpr,
    OVERLAP_LAUNCH: tl.constexpr,
):
    """Program (KV head, row, chunk); rows are tokens of a pure decode, or requests of a mixed batch (``MIXED``).

    In a mixed batch, rows that do not bring exactly one token leave at once; they belong to the prefill kernel.
    In a pure decode, rows of length 0 (padding) get zeros.
    """
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    if OVERLAP_LAUNCH:
        gdc_wait()  # launched while the previous kernel drains; its results are there from here on
    seq_len = tl.load(seq_lens_ptr + row, mask=row < num_rows, other=0)
    if MIXED:
        token = tl.load(query_start_ptr + row)
        if tl.load(query_start_ptr + row + 1) - token != 1:
            return
    else:
        token = row
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    in_head = dims < HEAD_DIM
    in_group = (heads < GROUP)[:, None] & in_head[None, :]
    within = (head * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
    # Nothing here depends on the length, so these loads and that of the length are under way together.
    token = token.to(tl.int64)
    q = tl.load(q_ptr + token * q_stride + within, mask=in_group, other=0.0)
    k_new = tl.load(k_ptr + token * k_stride + head * HEAD_DIM + dims, mask=in_head, other=0.0)
    v_new = tl.load(v_ptr + token * v_stride + head * HEAD_DIM + dims, mask=in_head, other=0.0)
    slot = tl.load(slot_mapping_ptr + token)
    out_row = out_ptr + token * out_stride
    if seq_len == 0:
        if split == 0:
            zeros = tl.zeros([GROUP_PADDED, HEAD_DIM_PADDED], out_ptr.dtype.element_ty)
            tl.store(out_row + within, zeros, mask=in_group)
        return
    last = seq_len - 1  # position of the new token
    begin, chunk, num_chunks = context_chunks(last, num_splits, occupancy_splits, min_chunk, max_chunk, WINDOW, BLOCK_N)
    if split >= num_chunks:
        return
    low = begin + split * chunk
    high = tl.minimum(low + chunk, last)
    plane = NUM_KV_HEADS * PAGE * HEAD_DIM
    head_offset = head * (PAGE * HEAD_DIM)

    running_max = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    running_sum = tl.zeros([GROUP_PADDED], tl.float32)
    acc = tl.zeros([GROUP_PADDED, HEAD_DIM_PADDED], tl.float32)
    table_row = block_table_ptr + row.to(tl.int64) * table_stride
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
        cells = blocks.to(tl.int64) * (2 * plane) + (head_offset + (positions % PAGE) * HEAD_DIM)
        blocks = load_blocks(table_row, start + BLOCK_N, high, PAGE, BLOCK_N)
        keys = cache_ptr + cells[:, None] + dims[None, :]
        loads = valid[:, None] & in_head[None, :]
        k = tl.load(keys, mask=loads, other=0.0)
        v = tl.load(keys + plane, mask=loads, other=0.0)
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

    # Chunk 0 takes the new token too, and puts it in the cache; elsewhere its score is minus infinity, its weight 0.
    owns_new = split == 0
    score_new = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * QK_SCALE
    score_new = tl.where(owns_new, score_new, float("-inf"))
    new_max = tl.maximum(running_max, score_new)
    weight_new = tl.exp2(score_new - new_max)
    rescale = tl.exp2(running_max - new_max)
    running_sum = running_sum * rescale + weight_new
    acc = acc * rescale[:, None] + weight_new[:, None] * v_new.to(tl.float32)[None, :]
    running_max = new_max
    writes = in_head & owns_new & (slot >= 0)
    target = cache_ptr + (slot // PAGE) * (2 * plane) + head_offset + (slot % PAGE) * HEAD_DIM + dims
    tl.store(target, k_new, mask=writes)
    tl.store(target + plane, v_new, mask=writes)

    if num_chunks == 1:
        tl.store(out_row + within, (acc / running_sum[:, None]).to(out_ptr.dtype.element_ty), mask=in_group)
    else:
        first_slot = (row * NUM_KV_HEADS + head) * num_splits
        rows = (first_slot + split) * GROUP + heads
        tl.store(partial_acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], acc, mask=in_group)
        tl.store(partial_max_ptr + rows, running_max, mask=heads < GROUP)
        tl.store(partial_sum_ptr + rows, running_sum, mask=heads < GROUP)
        if FUSED_MERGE:
            tl.debug_barrier()  # every thread's partial is written before this program is counted
            counter = counter_ptr + row * NUM_KV_HEADS + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == num_chunks - 1:
                tl.store(counter, 0)  # ready for the next launch
                merge_chunks(
                    out_row + head * (GROUP * HEAD_DIM),
                    partial_acc_ptr,
                    partial_max_ptr,
                    partial_sum_ptr,
                    first_slot,
                    num_chunks,
                    GROUP,
                    HEAD_DIM,
                    HEAD_DIM_PADDED,
                    GROUP_MERGE,
                    MERGE_TILE,
                )


@triton.jit(
    do_not_specialize=["num_rows", "num_splits", "occupancy_splits", "min_chunk", "max_chunk"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "query_start_ptr"],
)
def merge_kernel(
    out_ptr,
    seq_lens_ptr,
    query_start_ptr,
    partial_acc_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    out_stride,
    num_rows,
    num_splits,
    occupancy_splits,
    min_chunk,
    max_chunk,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_MERGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGE_TILE: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Program (KV head, row): combine what :func:`decode_kernel` left when it does not merge by itself."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + row, mask=row < num_rows, other=0)
    if MIXED:
        token = tl.load(query_start_ptr + row)
        if tl.load(query_start_ptr + row + 1) - token != 1:
            return
    else:
        token = row
    if seq_len == 0:
        return
    _, _, num_chunks = context_chunks(seq_len - 1, num_splits, occupancy_splits, min_chunk, max_chunk, WINDOW, BLOCK_N)
    if num_chunks == 1:
        return
    merge_chunks(
        out_ptr + token.to(tl.int64) * out_stride + head * (GROUP * HEAD_DIM),
        partial_acc_ptr,
        partial_max_ptr,
        partial_sum_ptr,
        (row * NUM_KV_HEADS + head) * num_splits,
        num_chunks,
        GROUP,
        HEAD_DIM,
        HEAD_DIM_PADDED,
        GROUP_MERGE,
        MERGE_TILE,
    )
