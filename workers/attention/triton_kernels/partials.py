# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""Partial results of a decode: where chunks of one context leave them, and how the last to finish combines them.

A slot holds, for each query head of a KV group, an unnormalised accumulator and the maximum and sum of its softmax.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_partial(
    partial_acc_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    slot,
    acc,
    running_max,
    running_sum,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
):
    """Leave a chunk's result in its workspace slot."""
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    rows = slot * GROUP + heads
    live = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(partial_acc_ptr + rows[:, None] * HEAD_DIM + dims[None, :], acc, mask=live)
    tl.store(partial_max_ptr + rows, running_max, mask=heads < GROUP)
    tl.store(partial_sum_ptr + rows, running_sum, mask=heads < GROUP)


@triton.jit
def arrive(counter, num_chunks):
    """Count this program in, after everything it stored; returns whether it is the last of ``num_chunks``."""
    tl.debug_barrier()  # all threads have stored; the release below then covers them
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == num_chunks - 1
    if is_last:
        tl.store(counter, 0)  # as the next launch must find it
    return is_last


@triton.jit
def merge_chunks(
    out_ptr,
    partial_acc_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    grid_slot,
    overflow_slot,
    num_splits,
    num_chunks,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    GROUP_MERGE: tl.constexpr,
    MERGE_TILE: tl.constexpr,
):
    """Combine the partial results of one request and KV head.

    With m_s, l_s, a_s the maximum, sum and accumulator of chunk s, and m the largest m_s:
    out = sum(2^(m_s - m) a_s) / sum(2^(m_s - m) l_s).

    Args:
        out_ptr: The group's first output element.
        grid_slot: Slot of chunk 0; the first ``num_splits`` chunks follow one another.
        overflow_slot: Slot of chunk ``num_splits``; the others follow one another.
    """
    heads = tl.arange(0, GROUP_MERGE)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    running_max = tl.full([GROUP_MERGE], float("-inf"), tl.float32)
    running_sum = tl.zeros([GROUP_MERGE], tl.float32)
    acc = tl.zeros([GROUP_MERGE, HEAD_DIM_PADDED], tl.float32)
    for first in range(0, num_chunks, MERGE_TILE):
        chunks = first + tl.arange(0, MERGE_TILE)
        slots = tl.where(chunks < num_splits, grid_slot + chunks, overflow_slot + chunks - num_splits)
        rows = slots[:, None] * GROUP + heads[None, :]
        live = (chunks < num_chunks)[:, None] & (heads < GROUP)[None, :]
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
