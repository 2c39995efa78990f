"""Capture sizes: the default grid, the user's list, and the sizes of uniform graphs."""

from __future__ import annotations

import itertools
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import ConfigError
from workers.graphs import default_capture_sizes
from workers.graphs.sizes import uniform_capture_sizes

GRID_512 = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


def test_defaults_of_a_large_engine_are_the_51_sizes_of_the_grid() -> None:
    sizes = default_capture_sizes(256, 8192)
    assert sizes == GRID_512
    assert len(sizes) == 51


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "query_len", "expected"),
    [
        (1, 8192, 1, [1, 2]),
        (3, 8192, 1, [1, 2, 3, 4]),
        (4, 8192, 1, [1, 2, 4, 8]),
        (10, 8192, 1, [1, 2, 4, 8, 10, 16]),
        (10, 12, 1, [1, 2, 4, 8, 10]),
        (10, 9, 1, [1, 2, 4, 8]),
        (1024, 8192, 1, GRID_512),
        (250, 8192, 1, sorted({*GRID_512, 250} - {512})),
        (8, 8192, 4, [1, 2, 4, *range(8, 65, 8)]),
        # 15 = 5 * 3 added: 8 rounds up to 9 and 16 to 18, so the fullest decode batch would have no graph.
        (5, 8192, 3, [1, 2, 4, 5, 8, 15, 16, 24]),
    ],
)
def test_defaults(max_num_seqs: int, max_num_batched_tokens: int, query_len: int, expected: list[int]) -> None:
    assert default_capture_sizes(max_num_seqs, max_num_batched_tokens, query_len) == expected


@given(
    max_num_seqs=st.integers(1, 700),
    max_num_batched_tokens=st.integers(1, 3000),
    query_len=st.integers(1, 5),
    max_size=st.none() | st.integers(1, 900),
)
def test_default_grid_properties(
    max_num_seqs: int, max_num_batched_tokens: int, query_len: int, max_size: int | None
) -> None:
    sizes = default_capture_sizes(max_num_seqs, max_num_batched_tokens, query_len, max_size=max_size)
    limit = max_size if max_size is not None else min(2 * max_num_seqs * query_len, 512)
    limit = min(limit, max_num_batched_tokens)
    assert sizes == sorted(set(sizes))
    assert 1 == sizes[0] <= sizes[-1] <= limit
    assert (max_num_seqs in sizes) == (max_num_seqs <= limit)
    grid = {1, 2, 4, *range(8, 256, 8), *range(256, limit + 1, 16)}
    assert {size for size in grid if size <= limit} <= set(sizes)
    assert len(set(sizes) - grid) <= 2
    # Padding from one size to the next is less than 16 tokens, or less than the size itself.
    assert all(b - a <= max(16, a) for a, b in itertools.pairwise(sizes))


@given(max_num_seqs=st.integers(1, 600), query_len=st.integers(1, 8))
def test_the_fullest_decode_batch_has_a_graph_of_its_size(max_num_seqs: int, query_len: int) -> None:
    sizes = default_capture_sizes(max_num_seqs, 8192, query_len)
    fullest = max_num_seqs * query_len
    uniform = uniform_capture_sizes(sizes, max_num_seqs, query_len)
    # Just above the largest size it may still have one, if that size rounds up to it.
    assert (fullest in uniform) == (fullest - query_len < sizes[-1])


def test_a_users_list_is_sorted_and_deduplicated() -> None:
    assert default_capture_sizes(8, 100, sizes=[16, 1, 4, 16]) == [1, 4, 16]
    assert default_capture_sizes(8, 100, sizes=(3,), max_size=3) == [3]


def test_entries_above_the_batch_limit_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert default_capture_sizes(8, 16, sizes=[1, 16, 17, 400]) == [1, 16]
    assert len(caplog.records) == 1
    assert "[17, 400]" in caplog.text


def test_a_users_max_above_the_batch_limit_is_lowered_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert default_capture_sizes(8, 10, max_size=64) == [1, 2, 4, 8]
    assert "lowered from 64" in caplog.text


def test_a_users_max_need_not_be_on_the_grid() -> None:
    assert default_capture_sizes(200, 2048, max_size=257)[-1] == 256


@pytest.mark.parametrize(
    ("sizes", "max_size", "match"),
    [
        ([], None, "must not be empty"),
        ([1, 2, 4], 8, "ends at 4 but max_cudagraph_capture_size is 8"),
        ([1, 2, 16], 8, "ends at 16 but max_cudagraph_capture_size is 8"),
        ([0, 1], None, "at least 1"),
        ([-3], None, "at least 1"),
        ([300, 400], None, "every entry of cudagraph_capture_sizes is above"),
        (None, 0, "must be at least 1"),
    ],
)
def test_contradictions_are_errors(sizes: list[int] | None, max_size: int | None, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        default_capture_sizes(8, 128, sizes=sizes, max_size=max_size)


@pytest.mark.parametrize("max_size", [400, 16])
def test_a_users_max_may_agree_with_the_list_before_or_after_dropping(max_size: int) -> None:
    assert default_capture_sizes(8, 128, sizes=[1, 16, 400], max_size=max_size) == [1, 16]


@given(sizes=st.lists(st.integers(1, 300), min_size=1), max_num_seqs=st.integers(1, 64), query_len=st.integers(1, 6))
def test_uniform_sizes(sizes: list[int], max_num_seqs: int, query_len: int) -> None:
    uniform = uniform_capture_sizes(sizes, max_num_seqs, query_len)
    assert uniform == sorted(set(uniform))
    assert all(size % query_len == 0 and query_len <= size <= query_len * max_num_seqs for size in uniform)
    for size in sizes:
        rounded = next(n for n in range(size, size + query_len) if n % query_len == 0)
        assert (rounded in uniform) == (rounded <= query_len * max_num_seqs)
