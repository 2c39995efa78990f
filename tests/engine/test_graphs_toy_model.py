"""A toy model through the whole graph layer on the host backend: same numbers from every mode, for random batches."""

from __future__ import annotations

import random

import pytest
import torch

from tests.graph_toys import HIDDEN, LAYERS, SLOTS, ToyRequest, ToyRunner, random_batches
from workers.graphs import BatchDescriptor, CUDAGraphMode, GraphMemoryBudget
from workers.graphs.backends.host import HostGraphBackend

CPU = torch.device("cpu")
M = CUDAGraphMode
SIZES = [1, 2, 4, 6, 8, 16, 24]


def _runner(mode: CUDAGraphMode, **options: object) -> ToyRunner:
    return ToyRunner(CPU, mode, SIZES, 6, backend=HostGraphBackend(), **options)  # type: ignore[arg-type]


def _assert_same_cache(runner: ToyRunner, reference: ToyRunner) -> None:
    for cache, expected in zip(runner.caches_LNH, reference.caches_LNH, strict=True):
        torch.testing.assert_close(cache[:SLOTS], expected[:SLOTS])


@pytest.mark.parametrize("mode", list(M))
@pytest.mark.parametrize("background", [False, True], ids=["all captured first", "captured in idle gaps"])
def test_every_mode_gives_the_eager_numbers(mode: CUDAGraphMode, background: bool) -> None:
    reference = ToyRunner(CPU, M.NONE, SIZES, 6)
    runner = _runner(mode, first_sizes=[] if background else "all")
    runner.capturer.capture_first_set()
    assert runner.plan.is_ready
    rng = random.Random(7)
    for index, batch in enumerate(random_batches(random.Random(5), 6, 40)):
        torch.testing.assert_close(runner.step(batch), reference.step(batch))
        if background and index % 3 == 0:
            runner.capturer.capture_next(idle=rng.random() < 0.8)
    _assert_same_cache(runner, reference)
    if mode is not M.NONE:
        assert runner.counters.num_replays() > 0
        assert runner.counters.num_padded_tokens > 0
    assert runner.counters.num_batches.total() == runner.histogram.num_batches
    if not background:
        reasons = {"graphs are off"} if mode is M.NONE else {"the batch is above the largest capture size"}
        if mode is M.FULL_DECODE_ONLY:
            reasons = {"this mode runs mixed batches without graphs"}
        assert set(runner.counters.fallbacks) <= reasons


def test_uniform_batches_of_several_tokens() -> None:
    reference = ToyRunner(CPU, M.NONE, SIZES, 4)
    runner = ToyRunner(CPU, M.FULL_AND_PIECEWISE, SIZES, 4, query_len=3, backend=HostGraphBackend(), first_sizes="all")
    runner.capturer.capture_first_set()
    requests = [ToyRequest([1 + n, 2, 3, 4, 5, 6], 0, list(range(10 * n, 10 * n + 6))) for n in range(4)]
    for num_reqs in (4, 3, 1):
        for request in requests:
            request.num_computed = 0
        for _ in range(2):
            batch = [(request, 3) for request in requests[:num_reqs]]
            torch.testing.assert_close(runner.step(batch), reference.step(batch))
            for request in requests:
                request.num_computed += 3
    # 4 x 3 tokens: the size 16 rounds up to 18, above 12, so a piecewise graph serves the fullest batch here.
    assert runner.counters.num_batches == {M.FULL: 4, M.PIECEWISE: 2}


def test_padding_touches_neither_the_cache_nor_the_real_rows() -> None:
    request = ToyRequest([3, 1, 4, 1, 5], 0, [9, 8, 7, 6, 5])
    logits = []
    for mode in (M.NONE, M.FULL, M.PIECEWISE):
        runner = _runner(mode, first_sizes=[24])
        runner.capturer.capture_first_set()
        for cache_NH in runner.caches_LNH:
            cache_NH.zero_()
        logits.append(runner.step([(request, 5)]))
        for cache_NH in runner.caches_LNH:
            assert set(cache_NH[:SLOTS].abs().sum(1).nonzero().flatten().tolist()) == set(request.slots)
        if mode is not M.NONE:
            assert runner.counters.num_padded_tokens == 19
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0])


def test_nested_wrappers_capture_only_in_their_own_mode() -> None:
    runner = _runner(M.FULL_AND_PIECEWISE, first_sizes=[4])
    runner.capturer.capture_first_set()
    pieces, full = runner.wrappers[:-1], runner.wrappers[-1]
    assert len(pieces) == LAYERS + 1
    assert all(piece.captured_descriptors() == [BatchDescriptor(4)] for piece in pieces)
    assert full.captured_descriptors() == [BatchDescriptor(4, 4, True)]
    assert runner.counters.num_graphs(M.FULL) == 1
    assert runner.counters.num_graphs(M.PIECEWISE) == LAYERS + 1
    requests = [ToyRequest([1, 2, 3, 4], 0, [4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3]) for n in range(2)]
    runner.step([(request, 1) for request in requests])
    assert runner.counters.num_replays(M.FULL) == 1
    assert runner.counters.num_replays(M.PIECEWISE) == 0
    runner.step([(requests[0], 2), (requests[1], 1)])
    assert runner.counters.num_replays(M.FULL) == 1
    assert runner.counters.num_replays(M.PIECEWISE) == LAYERS + 1


@pytest.mark.parametrize("mode", [M.FULL, M.PIECEWISE, M.FULL_AND_PIECEWISE])
def test_memory_is_that_of_the_largest_size_and_not_the_sum(mode: CUDAGraphMode) -> None:
    largest = ToyRunner(CPU, mode, [24], 24, backend=HostGraphBackend(), first_sizes="all")
    many = ToyRunner(CPU, mode, list(range(24, 0, -2)), 24, backend=HostGraphBackend(), first_sizes="all")
    for runner in (largest, many):
        runner.capturer.capture_first_set()
    row = HIDDEN * 8
    assert largest.budget.total_bytes >= 24 * row
    assert many.counters.num_graphs() == 12 * largest.counters.num_graphs()
    assert many.budget.total_bytes == largest.budget.total_bytes
    assert many.budget.total_bytes == sum(entry.num_bytes for entry in many.counters.by_key().values())


def test_weights_can_be_reloaded() -> None:
    reference = ToyRunner(CPU, M.NONE, SIZES, 6)
    runner = _runner(M.FULL_AND_PIECEWISE)
    runner.capturer.capture_first_set()
    request = ToyRequest([1, 2, 3], 0, [0, 1, 2])
    torch.testing.assert_close(runner.step([(request, 1)]), reference.step([(request, 1)]))
    runner.capturer.clear()
    assert runner.counters.num_graphs() == 0
    assert not runner.plan.is_ready
    for toy in (runner, reference):
        toy.model.embedding_VH = torch.flip(toy.model.embedding_VH, (0,))
    torch.testing.assert_close(runner.step([(request, 1)]), reference.step([(request, 1)]))
    assert runner.counters.fallbacks == {"no graph that fits is captured yet": 1}
    runner.capturer.capture_first_set()
    request.num_computed = 1
    torch.testing.assert_close(runner.step([(request, 1)]), reference.step([(request, 1)]))
    assert runner.counters.num_batches[M.FULL] == 2


def test_a_smaller_set_is_captured_where_the_memory_does_not_suffice() -> None:
    generous = _runner(M.FULL, first_sizes="all")
    generous.capturer.capture_first_set()
    runner = _runner(M.FULL, first_sizes="all", budget=GraphMemoryBudget(generous.budget.total_bytes // 2))
    runner.capturer.capture_first_set()
    assert runner.plan.is_done
    assert runner.budget.total_bytes <= (runner.budget.limit_bytes or 0)
    kept = [descriptor.num_tokens for _, descriptor in runner.dispatcher.captured_keys()]
    assert 24 not in kept
    assert 1 in kept
    assert {key[1].num_tokens for key in runner.plan.dropped} >= {24}
    assert {skipped.key for skipped in runner.budget.skipped} == set(runner.plan.dropped)
    long = ToyRequest(list(range(20)), 0, list(range(20)))
    reference = ToyRunner(CPU, M.NONE, SIZES, 6)
    torch.testing.assert_close(runner.step([(long, 20)]), reference.step([(long, 20)]))
    assert runner.counters.fallbacks == {"the graphs that fit were dropped": 1}
