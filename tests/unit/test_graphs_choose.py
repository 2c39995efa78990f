"""Choosing capture sizes: the dynamic programme against trying every set."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import ConfigError
from workers.graphs import (
    BatchHistogram,
    auto_capture_sizes,
    choose_capture_sizes,
    default_capture_sizes,
    padded_work,
)

COUNTS = st.dictionaries(st.integers(1, 14), st.integers(0, 20), max_size=9)


def _stairs(num_tokens: int) -> float:
    """Work that is flat up to 4 tokens, as decode is while it waits for memory, and then grows."""
    return float(max(4, num_tokens) ** 1.5)


def _brute_force(counts: dict[int, int], num_sizes: int, required: set[int], work: object) -> float:
    largest = max([size for size, count in counts.items() if count] + list(required))
    best = float("inf")
    for num in range(1, num_sizes + 1):
        for sizes in itertools.combinations(range(1, largest + 1), num):
            if sizes[-1] == largest and required <= set(sizes):
                best = min(best, padded_work(sizes, counts, work))  # type: ignore[arg-type]
    return best


@given(
    counts=COUNTS,
    num_sizes=st.integers(1, 5),
    required=st.sets(st.integers(1, 14), max_size=2),
    work=st.sampled_from([float, _stairs]),
)
def test_against_brute_force(counts: dict[int, int], num_sizes: int, required: set[int], work: object) -> None:
    seen = {size for size, count in counts.items() if count}
    if not seen | required:
        assert choose_capture_sizes(counts, num_sizes, required) == []
        return
    if len({max(seen | required), *required}) > num_sizes:
        with pytest.raises(ConfigError, match="too few"):
            choose_capture_sizes(counts, num_sizes, required)
        return
    sizes = choose_capture_sizes(counts, num_sizes, required, work)  # type: ignore[arg-type]
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= num_sizes
    assert required <= set(sizes) <= seen | required
    assert sizes[-1] == max(seen | required)
    cost = padded_work(sizes, counts, work)  # type: ignore[arg-type]
    assert cost == pytest.approx(_brute_force(counts, num_sizes, required, work), abs=1e-6)


def test_enough_sizes_leave_no_padding_and_no_superfluous_size() -> None:
    counts = {1: 5, 3: 5, 9: 1}
    assert choose_capture_sizes(counts, 20) == [1, 3, 9]
    assert padded_work([1, 3, 9], counts) == 0


def test_frequent_sizes_win() -> None:
    assert choose_capture_sizes({5: 1000, 6: 1, 7: 1, 8: 1}, 2) == [5, 8]
    assert choose_capture_sizes({5: 1, 6: 1, 7: 1000, 8: 1}, 2) == [7, 8]


def test_padded_work_leaves_out_what_is_not_served() -> None:
    assert padded_work([2, 4], {1: 3, 3: 2, 9: 100}) == 3 * 1 + 2 * 1


@given(st.dictionaries(st.integers(1, 512), st.integers(1, 1000), min_size=1, max_size=80), st.integers(2, 24))
def test_never_worse_than_the_default_grid_cut_to_k(counts: dict[int, int], num_sizes: int) -> None:
    largest = max(counts)
    sizes = choose_capture_sizes(counts, num_sizes)
    step = -(-largest // num_sizes)
    even = sorted({min(largest, step * index) for index in range(1, num_sizes + 1)})
    assert padded_work(sizes, counts) <= padded_work(even, counts)


def test_auto_serves_everything_up_to_the_default_maximum() -> None:
    histogram = BatchHistogram()
    for num_reqs in (3, 3, 3, 5, 7, 900) * 1000:
        histogram.record(num_reqs, num_reqs, is_decode=True)
    for _ in range(1000):
        histogram.record(1, 40, is_decode=False)
    sizes = auto_capture_sizes(histogram, 24, 8192, num_sizes=5)
    assert sizes[-1] == 48
    assert 24 in sizes
    assert 3 in sizes
    assert len(sizes) == 5
    assert auto_capture_sizes(histogram, 24, 8192, num_sizes=2) == [24, 48]
    assert auto_capture_sizes(histogram, 100, 40, num_sizes=2) == [7, 40]


def test_auto_counts_several_tokens_per_request() -> None:
    histogram = BatchHistogram()
    for _ in range(1000):
        histogram.record(3, 6, is_decode=True)
    assert auto_capture_sizes(histogram, 8, 8192, 2, num_sizes=3) == [6, 16, 32]


def test_auto_covers_everything_on_little_traffic_and_follows_much_of_it() -> None:
    histogram = BatchHistogram()
    histogram.record(5, 5, is_decode=True)
    grid = default_capture_sizes(256, 8192)
    sizes = auto_capture_sizes(histogram, 256, 8192)
    assert len(sizes) == 16
    assert max(padded / size for size, padded in _served(sizes, grid) if size >= 32) < 2
    for size in range(30, 40):
        for _ in range(10_000):
            histogram.record(size, size, is_decode=True)
    assert set(range(30, 40)) <= set(auto_capture_sizes(histogram, 256, 8192))


def _served(sizes: list[int], batches: list[int]) -> list[tuple[int, int]]:
    return [(batch, next(size for size in sizes if size >= batch)) for batch in batches]


def test_auto_with_thousands_of_different_sizes_is_quick_and_still_serves_them() -> None:
    histogram = BatchHistogram()
    for size in range(1, 5001):
        histogram.record(1, size, is_decode=False)
    sizes = auto_capture_sizes(histogram, 100, 8192, max_size=5000)
    assert sizes[-1] == 4992  # the largest default size within max_size
    assert 100 in sizes
    assert len(sizes) == 16


def test_auto_needs_room_for_the_sizes_that_are_always_captured() -> None:
    histogram = BatchHistogram()
    histogram.record(1, 1, is_decode=True)
    with pytest.raises(ConfigError, match="too few"):
        auto_capture_sizes(histogram, 24, 8192, num_sizes=1)


def test_auto_without_traffic_is_the_default_grid() -> None:
    assert auto_capture_sizes(BatchHistogram(), 24, 8192) == default_capture_sizes(24, 8192)
