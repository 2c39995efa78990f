"""Dispatch and padding, against a dispatcher that tries every key."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import ConfigError
from workers.graphs import (
    BatchDescriptor,
    BatchHistogram,
    CUDAGraphMode,
    FallbackReason,
    GraphCounters,
    GraphDispatcher,
    GraphKey,
    default_capture_sizes,
)

M = CUDAGraphMode


def _dispatcher(
    mode: CUDAGraphMode, sizes: list[int], max_num_seqs: int = 8, query_len: int = 1, *, capture: bool = True
) -> GraphDispatcher:
    dispatcher = GraphDispatcher(mode, sizes, max_num_seqs, query_len)
    if capture:
        for key in dispatcher.capture_order():
            dispatcher.mark_captured(*key)
    return dispatcher


SIZES = [1, 2, 4, 8, 16]
UNIFORM_3 = (M.FULL, BatchDescriptor(4, 4, True))


@pytest.mark.parametrize(
    ("mode", "decode", "mixed"),
    [
        (M.NONE, (M.NONE, BatchDescriptor(3)), (M.NONE, BatchDescriptor(7))),
        (M.PIECEWISE, (M.PIECEWISE, BatchDescriptor(4)), (M.PIECEWISE, BatchDescriptor(8))),
        (M.FULL, UNIFORM_3, (M.FULL, BatchDescriptor(8, 8))),
        (M.FULL_DECODE_ONLY, UNIFORM_3, (M.NONE, BatchDescriptor(7))),
        (M.FULL_AND_PIECEWISE, UNIFORM_3, (M.PIECEWISE, BatchDescriptor(8))),
    ],
)
def test_each_mode(mode: CUDAGraphMode, decode: GraphKey, mixed: GraphKey) -> None:
    dispatcher = _dispatcher(mode, SIZES)
    assert dispatcher.dispatch(3, 3, 1) == decode
    assert dispatcher.dispatch(3, 7, None) == mixed


def test_unpadded_without_a_graph() -> None:
    dispatcher = _dispatcher(M.FULL, SIZES)
    assert dispatcher.dispatch(3, 17, None) == (M.NONE, BatchDescriptor(17))
    assert dispatcher.dispatch(0, 0, None) == (M.NONE, BatchDescriptor(0))
    assert _dispatcher(M.FULL, SIZES, capture=False).dispatch(1, 1, 1) == (M.NONE, BatchDescriptor(1))


def test_full_keys_carry_the_number_of_requests() -> None:
    dispatcher = _dispatcher(M.FULL, [4, 8], max_num_seqs=6)
    assert dispatcher.dispatch(2, 5, None) == (M.FULL, BatchDescriptor(8, 6))
    assert dispatcher.dispatch(3, 3, 1) == (M.FULL, BatchDescriptor(4, 4, True))
    # 5 requests fit no uniform graph (8 is above max_num_seqs); a mixed one serves them.
    assert dispatcher.dispatch(5, 5, 1) == (M.FULL, BatchDescriptor(8, 6))
    assert dispatcher.dispatch(7, 8, None) == (M.NONE, BatchDescriptor(8))


def test_several_tokens_per_request() -> None:
    dispatcher = _dispatcher(M.FULL_AND_PIECEWISE, [1, 2, 4, 8, 16], max_num_seqs=5, query_len=3)
    full = [descriptor for mode, descriptor in dispatcher.capture_order() if mode is M.FULL]
    assert full == [BatchDescriptor(9, 3, True), BatchDescriptor(6, 2, True), BatchDescriptor(3, 1, True)]
    assert dispatcher.dispatch(2, 6, 3) == (M.FULL, BatchDescriptor(6, 2, True))
    assert dispatcher.dispatch(4, 12, 3) == (M.PIECEWISE, BatchDescriptor(16))
    # One token each is not what a uniform graph was captured for.
    assert dispatcher.dispatch(2, 2, 1) == (M.PIECEWISE, BatchDescriptor(2))


def test_the_next_larger_captured_graph_serves_meanwhile() -> None:
    dispatcher = _dispatcher(M.FULL_AND_PIECEWISE, SIZES, capture=False)
    dispatcher.mark_captured(M.PIECEWISE, BatchDescriptor(4))
    assert dispatcher.dispatch(1, 1, 1) == (M.PIECEWISE, BatchDescriptor(4))
    dispatcher.mark_captured(M.FULL, BatchDescriptor(8, 8, True))
    assert dispatcher.dispatch(1, 1, 1) == (M.FULL, BatchDescriptor(8, 8, True))
    assert dispatcher.dispatch(1, 5, None) == (M.NONE, BatchDescriptor(5))
    dispatcher.mark_captured(M.FULL, BatchDescriptor(2, 2, True))
    assert dispatcher.dispatch(1, 1, 1) == (M.FULL, BatchDescriptor(2, 2, True))
    assert dispatcher.captured_keys() == [
        (M.FULL, BatchDescriptor(8, 8, True)),
        (M.PIECEWISE, BatchDescriptor(4)),
        (M.FULL, BatchDescriptor(2, 2, True)),
    ]
    dispatcher.clear()
    assert dispatcher.dispatch(1, 1, 1) == (M.NONE, BatchDescriptor(1))


@pytest.mark.parametrize(
    ("mode", "batch", "reason"),
    [
        (M.NONE, (1, 1, 1), FallbackReason.GRAPHS_OFF),
        (M.FULL_DECODE_ONLY, (1, 2, None), FallbackReason.MIXED_BATCH),
        (M.FULL, (0, 0, None), FallbackReason.ZERO_TOKENS),
        (M.FULL, (1, 99, None), FallbackReason.ABOVE_LARGEST),
        (M.FULL_DECODE_ONLY, (9, 9, 1), FallbackReason.ABOVE_LARGEST),
        (M.PIECEWISE, (1, 1, 1), FallbackReason.NOT_CAPTURED),
    ],
)
def test_fallbacks_say_why(mode: CUDAGraphMode, batch: tuple[int, int, int | None], reason: FallbackReason) -> None:
    decision = _dispatcher(mode, SIZES, capture=False).decide(*batch)
    assert decision.mode is M.NONE
    assert decision.fallback_reason is reason


def test_a_dropped_graph_is_a_reason_only_if_nothing_else_can_still_come() -> None:
    dispatcher = _dispatcher(M.PIECEWISE, [4, 8], capture=False)
    dispatcher.mark_dropped(M.PIECEWISE, BatchDescriptor(8))
    assert dispatcher.decide(1, 1, 1).fallback_reason is FallbackReason.NOT_CAPTURED
    assert dispatcher.decide(1, 5, None).fallback_reason is FallbackReason.DROPPED
    dispatcher.mark_captured(M.PIECEWISE, BatchDescriptor(8))
    dispatcher.mark_dropped(M.PIECEWISE, BatchDescriptor(8))
    assert not dispatcher.is_captured(M.PIECEWISE, BatchDescriptor(8))


def test_errors_and_invariants() -> None:
    with pytest.raises(ConfigError, match="needs capture sizes"):
        GraphDispatcher(M.FULL, [], 8)
    assert GraphDispatcher(M.NONE, [], 8).dispatch(1, 1, 1) == (M.NONE, BatchDescriptor(1))
    dispatcher = _dispatcher(M.PIECEWISE, SIZES)
    with pytest.raises(AssertionError, match="not a key"):
        dispatcher.mark_captured(M.FULL, BatchDescriptor(4))
    with pytest.raises(AssertionError):
        dispatcher.dispatch(2, 3, 1)


def test_dispatch_counts_and_learns() -> None:
    counters, histogram = GraphCounters(), BatchHistogram()
    dispatcher = GraphDispatcher(M.FULL_DECODE_ONLY, SIZES, 8, counters=counters, traffic=histogram)
    for key in dispatcher.capture_order():
        dispatcher.mark_captured(*key)
    for batch in [(3, 3, 1), (5, 5, 1), (2, 40, None), (0, 0, None)]:
        dispatcher.dispatch(*batch)
    dispatcher.decide(3, 3, 1)  # counts nothing
    assert counters.num_batches == {M.FULL: 2, M.NONE: 2}
    assert counters.num_tokens == 48
    assert counters.num_padded_tokens == (4 - 3) + (8 - 5)
    assert counters.fallbacks == {FallbackReason.MIXED_BATCH: 1, FallbackReason.ZERO_TOKENS: 1}
    assert histogram.decode == {3: 1, 5: 1}
    assert histogram.mixed == {40: 1}


@st.composite
def _cases(draw: st.DrawFn) -> tuple[GraphDispatcher, int, int, int | None]:
    mode = draw(st.sampled_from(M))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    dispatcher = GraphDispatcher(mode, sizes, draw(st.integers(1, 12)), draw(st.integers(1, 4)))
    order = dispatcher.capture_order()
    for key in draw(st.lists(st.sampled_from(order))) if order else []:
        dispatcher.mark_captured(*key)
    num_reqs = draw(st.integers(0, dispatcher.max_num_seqs))
    if draw(st.booleans()):
        query_len = draw(st.sampled_from([1, dispatcher.query_len]))
        return dispatcher, num_reqs, num_reqs * query_len, query_len
    num_tokens = num_reqs + draw(st.integers(0, 40)) if num_reqs else 0
    return dispatcher, num_reqs, num_tokens, None


@given(_cases())
def test_dispatch_against_trying_every_key(case: tuple[GraphDispatcher, int, int, int | None]) -> None:
    dispatcher, num_reqs, num_tokens, uniform_query_len = case
    mode, descriptor = dispatcher.dispatch(num_reqs, num_tokens, uniform_query_len)
    is_decode = uniform_query_len == dispatcher.query_len
    fitting = [
        (m, d)
        for m, d in dispatcher.captured_keys()
        if num_tokens > 0
        and d.num_tokens >= num_tokens
        and (d.num_reqs is None or d.num_reqs >= num_reqs)
        and (is_decode or not d.uniform)
    ]
    preference = [(M.FULL, True), (M.FULL, False), (M.PIECEWISE, False)]
    for kind in preference:
        same = [(m, d) for m, d in fitting if (m, d.uniform) == kind]
        if same:
            assert (mode, descriptor) == min(same, key=lambda key: key[1].num_tokens)
            return
    assert (mode, descriptor) == (M.NONE, BatchDescriptor(num_tokens))


@given(_cases())
def test_keys_and_capture_order(case: tuple[GraphDispatcher, int, int, int | None]) -> None:
    dispatcher = case[0]
    order = dispatcher.capture_order()
    assert len(order) == len(set(order))
    tokens = [descriptor.num_tokens for _, descriptor in order]
    assert tokens == sorted(tokens, reverse=True)
    mode = dispatcher.mode
    for runtime_mode, descriptor in order:
        assert runtime_mode in (mode.decode_mode(), mode.mixed_mode())
        assert (descriptor.num_reqs is None) == (runtime_mode is M.PIECEWISE)
        if descriptor.uniform:
            assert descriptor.num_tokens == (descriptor.num_reqs or 0) * dispatcher.query_len
        if descriptor.num_reqs is not None:
            assert descriptor.num_reqs <= dispatcher.max_num_seqs
    if M.FULL not in (mode.decode_mode(), mode.mixed_mode()):
        assert not any(m is M.FULL for m, _ in order)


def test_every_decode_batch_of_the_default_sizes_has_a_full_graph() -> None:
    for max_num_seqs, query_len in itertools.product([1, 5, 8, 13, 64], [1, 2, 3]):
        sizes = default_capture_sizes(max_num_seqs, 8192, query_len)
        dispatcher = _dispatcher(M.FULL_AND_PIECEWISE, sizes, max_num_seqs, query_len)
        for num_reqs in range(1, max_num_seqs + 1):
            mode, descriptor = dispatcher.dispatch(num_reqs, num_reqs * query_len, query_len)
            assert mode is M.FULL
            assert descriptor.uniform
        fullest = dispatcher.dispatch(max_num_seqs, max_num_seqs * query_len, query_len)[1]
        assert fullest.num_tokens == max_num_seqs * query_len
