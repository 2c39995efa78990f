# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""How the decode kernel cuts contexts into chunks, on the device, from the lengths it finds there.

A context of at most ``num_splits * max_chunk`` tokens is cut into at most ``num_splits`` equal chunks, by a rule that
looks at that context alone. A longer one has more chunks than the grid has programs for its row; the rest *overflow*:
numbered row by row, they are shared out among programs that belong to no row. Every program that deals with a long
context derives the same numbers from the same lengths. Knows lengths and rows; nothing about keys or values.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def context_begin(last, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """First cached position to read, for a new token at ``last``: a multiple of BLOCK_N at or before the window."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(last + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    return begin


@triton.jit
def lengths_of_rows(
    rows,
    num_rows,
    seq_lens_ptr,
    query_start_ptr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Cached tokens that each of the rows reads; 0 for rows that this kernel passes over."""
    live = rows < num_rows
    seq_lens = tl.load(seq_lens_ptr + rows, mask=live, other=0)
    if MIXED:
        starts = tl.load(query_start_ptr + rows, mask=live, other=0)
        ends = tl.load(query_start_ptr + rows + 1, mask=live, other=0)
        seq_lens = tl.where(ends - starts == 1, seq_lens, 0)
    last = tl.maximum(seq_lens - 1, 0)
    return last - context_begin(last, WINDOW, BLOCK_N)


@triton.jit
def long_chunk(
    num_rows,
    num_splits,
    max_chunk,
    seq_lens_ptr,
    query_start_ptr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIXED: tl.constexpr,
    OVERFLOW_CHUNKS: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Tokens per chunk of every context longer than ``num_splits * max_chunk``, and how many such contexts there are.

    ``max_chunk``, or as much more as it takes for all their chunks to fit OVERFLOW_CHUNKS slots: with n contexts of
    N tokens together, chunks of c tokens are at most N / c + n.
    """
    num_tokens = 0
    num_long = 0
    for first in range(0, num_rows, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        lengths = lengths_of_rows(rows, num_rows, seq_lens_ptr, query_start_ptr, WINDOW, BLOCK_N, MIXED)
        is_long = lengths > num_splits * max_chunk
        num_tokens += tl.sum(tl.where(is_long, lengths, 0), 0)
        num_long += tl.sum(is_long.to(tl.int32), 0)
    room = tl.maximum(OVERFLOW_CHUNKS - num_long, 1)
    chunk = tl.maximum((num_tokens + room - 1) // room, max_chunk)
    return (chunk + BLOCK_N - 1) // BLOCK_N * BLOCK_N, num_long


@triton.jit
def overflow_of_rows(
    rows,
    num_rows,
    num_splits,
    max_chunk,
    chunk,
    seq_lens_ptr,
    query_start_ptr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Chunks of each row beyond the first ``num_splits``; ``chunk`` is :func:`long_chunk`'s."""
    lengths = lengths_of_rows(rows, num_rows, seq_lens_ptr, query_start_ptr, WINDOW, BLOCK_N, MIXED)
    extra = tl.maximum((lengths + chunk - 1) // chunk - num_splits, 0)
    return tl.where(lengths > num_splits * max_chunk, extra, 0)


@triton.jit
def overflow_before(
    row,
    num_rows,
    num_splits,
    max_chunk,
    chunk,
    seq_lens_ptr,
    query_start_ptr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIXED: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Overflow chunks of all rows before ``row``: where that row's own begin."""
    count = 0
    for first in range(0, row, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        extra = overflow_of_rows(
            rows, num_rows, num_splits, max_chunk, chunk, seq_lens_ptr, query_start_ptr, WINDOW, BLOCK_N, MIXED
        )
        count += tl.sum(tl.where(rows < row, extra, 0), 0)
    return count


@triton.jit
def find_overflow(
    item,
    num_rows,
    num_splits,
    max_chunk,
    chunk,
    seq_lens_ptr,
    query_start_ptr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIXED: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Row of overflow chunk ``item`` and the number of overflow chunks before that row's own."""
    row = 0
    before = 0
    seen = 0
    for first in range(0, num_rows, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        extra = overflow_of_rows(
            rows, num_rows, num_splits, max_chunk, chunk, seq_lens_ptr, query_start_ptr, WINDOW, BLOCK_N, MIXED
        )
        ends = seen + tl.cumsum(extra, 0)
        passed = (ends <= item) & (rows < num_rows)
        row += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
        seen += tl.sum(extra, 0)
    return row, before


@triton.jit
def row_work(
    row,
    num_rows,
    num_splits,
    min_chunk,
    max_chunk,
    seq_lens_ptr,
    query_start_ptr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIXED: tl.constexpr,
    OVERFLOW_CHUNKS: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Tokens per chunk of one row's context and its number of chunks; no chunk for a row that is passed over."""
    seq_len = tl.load(seq_lens_ptr + row, mask=row < num_rows, other=0)
    if MIXED:
        query_len = tl.load(query_start_ptr + row + 1) - tl.load(query_start_ptr + row)
        seq_len = tl.where(query_len == 1, seq_len, 0)
    last = seq_len - 1
    length = last - context_begin(last, WINDOW, BLOCK_N)
    chunk = tl.maximum((length + num_splits - 1) // num_splits, min_chunk)
    chunk = (chunk + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    if length > num_splits * max_chunk:
        chunk, _ = long_chunk(
            num_rows, num_splits, max_chunk, seq_lens_ptr, query_start_ptr,
            WINDOW, BLOCK_N, MIXED, OVERFLOW_CHUNKS, ROW_TILE,
        )  # fmt: skip
    num_chunks = tl.maximum((length + chunk - 1) // chunk, 1)  # the new token counts as part of the first
    return chunk, tl.where(seq_len > 0, num_chunks, 0)


@triton.jit
def overflow_work(
    num_rows,
    num_splits,
    max_chunk,
    seq_lens_ptr,
    query_start_ptr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIXED: tl.constexpr,
    OVERFLOW_CHUNKS: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Tokens per chunk of long contexts and the number of overflow chunks of all of them."""
    chunk, num_long = long_chunk(
        num_rows, num_splits, max_chunk, seq_lens_ptr, query_start_ptr,
        WINDOW, BLOCK_N, MIXED, OVERFLOW_CHUNKS, ROW_TILE,
    )  # fmt: skip
    count = 0
    if num_long > 0:
        count = overflow_before(
            num_rows, num_rows, num_splits, max_chunk, chunk, seq_lens_ptr, query_start_ptr,
            WINDOW, BLOCK_N, MIXED, ROW_TILE,
        )  # fmt: skip
    return chunk, count
