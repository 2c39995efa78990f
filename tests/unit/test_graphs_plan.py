"""The capture plan: what is captured first, what follows the traffic, and that everything is handed out once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.graphs import (
    BatchDescriptor,
    BatchHistogram,
    CapturePlan,
    CUDAGraphMode,
    GraphDispatcher,
    GraphKey,
    default_capture_sizes,
)
from workers.graphs.plan import default_first_sizes

M = CUDAGraphMode
FULL_AND_PIECEWISE = M.FULL_AND_PIECEWISE


def _dispatcher(mode: CUDAGraphMode = FULL_AND_PIECEWISE, max_num_seqs: int = 12) -> GraphDispatcher:
    return GraphDispatcher(mode, default_capture_sizes(max_num_seqs, 8192), max_num_seqs)


def _uniform(num_reqs: int) -> GraphKey:
    return M.FULL, BatchDescriptor(num_reqs, num_reqs, True)


def _piecewise(num_tokens: int) -> GraphKey:
    return M.PIECEWISE, BatchDescriptor(num_tokens)


def _drain(plan: CapturePlan, idle: bool = True) -> list[GraphKey]:
    keys = []
    while (key := plan.next_capture(idle)) is not None:
        keys.append(key)
        plan.mark_captured(key)
    return keys


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_default_first_sizes(max_num_seqs: int, expected: list[int]) -> None:
    assert default_first_sizes(max_num_seqs) == expected


def test_first_set_then_idle_gaps() -> None:
    dispatcher = _dispatcher()
    plan = CapturePlan(dispatcher.capture_order(), 12)
    sizes = [12, 8, 4, 2, 1]
    assert plan.first == [_piecewise(24), *(key for size in sizes for key in (_uniform(size), _piecewise(size)))]
    assert not plan.is_ready
    assert _drain(plan, idle=False) == plan.first
    assert plan.is_ready
    assert not plan.is_done
    assert plan.next_capture(idle=False) is None
    assert plan.pending == [_piecewise(16)]
    assert _drain(plan) == [_piecewise(16)]
    assert plan.is_done
    assert plan.next_capture(idle=True) is None
    plan.reset()
    assert not plan.is_ready
    assert _drain(plan, idle=False) == plan.first


def test_first_set_is_configurable() -> None:
    order = _dispatcher(M.FULL_DECODE_ONLY).capture_order()
    assert CapturePlan(order, 12, first_sizes=[3, 10]).first == [_uniform(12), _uniform(4)]
    assert CapturePlan(order, 12, first_sizes=[99]).first == [_uniform(12)]
    assert CapturePlan(order, 12, first_sizes="all").first == order
    nothing = CapturePlan(order, 12, first_sizes=[])
    assert nothing.is_ready
    assert nothing.next_capture(idle=False) is None
    assert CapturePlan([], 12).is_done


def test_first_set_counts_requests_of_uniform_graphs() -> None:
    dispatcher = GraphDispatcher(M.FULL_DECODE_ONLY, default_capture_sizes(4, 8192, 3), 4, 3)
    plan = CapturePlan(dispatcher.capture_order(), 4, 3)
    assert [descriptor.num_reqs for _, descriptor in plan.first] == [4, 2, 1]


def test_idle_captures_follow_the_traffic() -> None:
    histogram = BatchHistogram()
    dispatcher = GraphDispatcher(FULL_AND_PIECEWISE, [1, 2, 4, 8, 16, 32, 64, 128, 256], 64)
    plan = CapturePlan(dispatcher.capture_order(), 64, first_sizes=[64], histogram=histogram)
    _drain(plan, idle=False)
    for _ in range(10):
        histogram.record(3, 3, is_decode=True)  # saves 60 of 64 tokens with a graph of 4
    histogram.record(1, 100, is_decode=False)  # eager until there is a graph of 128 or 256
    key = plan.next_capture(idle=True)
    assert key == _uniform(4)
    plan.mark_captured(key)
    for _ in range(1000):
        histogram.record(2, 30, is_decode=False)
    key = plan.next_capture(idle=True)
    assert key == _piecewise(32)
    plan.mark_captured(key)
    key = plan.next_capture(idle=True)
    assert key == _piecewise(128)
    plan.drop(key, "too large")
    assert plan.dropped == {key: "too large"}
    # Nothing that is left would serve a batch better: largest first.
    rest = _drain(plan)
    assert rest == [k for k in dispatcher.capture_order() if k in rest]
    assert plan.is_done


def test_a_busy_engine_captures_only_what_its_batches_miss() -> None:
    histogram = BatchHistogram()
    dispatcher = GraphDispatcher(M.FULL_DECODE_ONLY, [1, 2, 4, 8], 8)
    plan = CapturePlan(dispatcher.capture_order(), 8, first_sizes=[8], histogram=histogram)
    _drain(plan, idle=False)
    assert plan.next_needed() is None  # no traffic
    for _ in range(10):
        histogram.record(8, 8, is_decode=True)
    assert plan.next_needed() is None  # nothing would save anything
    histogram.record(2, 2, is_decode=True)
    key = plan.next_needed()
    assert key == _uniform(2)
    with pytest.raises(AssertionError, match="still being captured"):
        plan.next_needed()
    plan.mark_captured(key)
    assert plan.next_needed() is None
    assert not plan.is_done


@given(
    counts=st.dictionaries(st.integers(1, 40), st.integers(1, 9), max_size=12),
    sizes=st.sets(st.integers(1, 30), min_size=1, max_size=10),
    data=st.data(),
)
def test_what_is_needed_most_against_serving_every_batch(
    counts: dict[int, int], sizes: set[int], data: st.DataObject
) -> None:
    histogram = BatchHistogram()
    histogram.mixed.update(counts)
    order = GraphDispatcher(M.PIECEWISE, sizes, 64).capture_order()
    plan = CapturePlan(order, 64, first_sizes=[], histogram=histogram)
    captured = data.draw(st.sets(st.sampled_from(sorted(sizes))))
    for size in captured:
        plan.mark_captured(_piecewise(size))

    def work(graphs: set[int]) -> int:
        eager = 2 * max(sizes)
        return sum(count * min((g for g in graphs if g >= size), default=eager) for size, count in counts.items())

    savings = {size: work(captured) - work(captured | {size}) for size in sorted(sizes - captured, reverse=True)}
    key = plan.next_needed()
    if not any(savings.values()):
        assert key is None
    else:
        assert key == _piecewise(max(savings, key=lambda size: savings[size]))


def test_decode_traffic_asks_for_piecewise_graphs_where_there_are_no_full_ones() -> None:
    histogram = BatchHistogram()
    histogram.record(2, 2, is_decode=True)
    order = GraphDispatcher(M.PIECEWISE, [1, 2, 4, 8], 8).capture_order()
    plan = CapturePlan(order, 8, first_sizes=[8], histogram=histogram)
    _drain(plan, idle=False)
    assert plan.next_capture(idle=True) == _piecewise(2)


def test_one_capture_at_a_time() -> None:
    plan = CapturePlan(_dispatcher().capture_order(), 12)
    key = plan.next_capture(idle=False)
    assert key is not None
    with pytest.raises(AssertionError, match="still being captured"):
        plan.next_capture(idle=True)
    plan.mark_captured(key)
    with pytest.raises(AssertionError, match="not waiting"):
        plan.mark_captured(key)
    with pytest.raises(AssertionError, match="not waiting"):
        plan.drop(key, "")


@st.composite
def _plans(draw: st.DrawFn) -> tuple[GraphDispatcher, CapturePlan, BatchHistogram]:
    max_num_seqs, query_len = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    mode = draw(st.sampled_from([mode for mode in M if mode is not M.NONE]))
    sizes = draw(
        st.just(default_capture_sizes(max_num_seqs, 8192, query_len))
        | st.lists(st.integers(1, 80), min_size=1, max_size=10)
    )
    dispatcher = GraphDispatcher(mode, sizes, max_num_seqs, query_len)
    histogram = BatchHistogram()
    for num_reqs, extra in draw(st.lists(st.tuples(st.integers(1, max_num_seqs), st.integers(0, 60)), max_size=10)):
        histogram.record(num_reqs, num_reqs * query_len + extra, is_decode=extra == 0)
    plan = CapturePlan(dispatcher.capture_order(), max_num_seqs, query_len, histogram=histogram)
    return dispatcher, plan, histogram


@given(_plans(), st.integers())
def test_every_graph_is_handed_out_once_and_the_first_set_first(
    case: tuple[GraphDispatcher, CapturePlan, BatchHistogram], seed: int
) -> None:
    dispatcher, plan, _ = case
    rng = random.Random(seed)
    handed_out: list[GraphKey] = []
    while not plan.is_done:
        idle = rng.random() < 0.5
        was_ready = plan.is_ready
        key = plan.next_capture(idle)
        assert (key is None) == (was_ready and not idle)
        if key is None:
            continue
        handed_out.append(key)
        if rng.random() < 0.5:
            plan.mark_captured(key)
            dispatcher.mark_captured(*key)
        else:
            plan.drop(key, "because")
    assert sorted(map(str, handed_out)) == sorted(map(str, dispatcher.capture_order()))
    assert handed_out[: len(plan.first)] == plan.first


@given(_plans())
def test_the_first_set_serves_every_decode_batch_that_has_a_graph_at_all(
    case: tuple[GraphDispatcher, CapturePlan, BatchHistogram],
) -> None:
    dispatcher, plan, _ = case
    everything = GraphDispatcher(dispatcher.mode, dispatcher.sizes, dispatcher.max_num_seqs, dispatcher.query_len)
    for key in everything.capture_order():
        everything.mark_captured(*key)
    for key in plan.first:
        dispatcher.mark_captured(*key)
    for num_reqs in range(1, dispatcher.max_num_seqs + 1):
        batch = (num_reqs, num_reqs * dispatcher.query_len, dispatcher.query_len)
        mode, descriptor = dispatcher.dispatch(*batch)
        best_mode, best = everything.dispatch(*batch)
        if not best.uniform and best_mode is not M.NONE:
            continue  # served by a graph for mixed batches, above the largest uniform one
        assert mode is best_mode
        if mode is not M.NONE and best.uniform:
            # Padded to the power of two, as far as the sizes allow.
            target = min(1 << (num_reqs - 1).bit_length(), dispatcher.max_num_seqs) * dispatcher.query_len
            keys = [d for _, d in reversed(everything.capture_order()) if d.uniform]
            bound = next((d for d in keys if d.num_tokens >= target), keys[-1])
            assert best.num_tokens <= descriptor.num_tokens <= bound.num_tokens
