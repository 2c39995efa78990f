"""The capturer: order of events around a capture, failures in the first set and in idle gaps, memory limits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from workers.errors import ConfigError
from workers.graphs import (
    BatchDescriptor,
    BatchHistogram,
    CapturePlan,
    CUDAGraphMode,
    CUDAGraphWrapper,
    ForwardContext,
    GraphCounters,
    GraphDispatcher,
    GraphMemoryBudget,
    MemoryPolicy,
    set_forward_context,
)
from workers.graphs.backends.host import HostGraphBackend
from workers.graphs.capturer import GraphCapturer

M = CUDAGraphMode


class Setup:
    """A capturer around one PIECEWISE wrapper pair, whose dummy runs are logged and can be made to fail."""

    def __init__(
        self, first_sizes: Any = (1, 2, 4), budget: GraphMemoryBudget | None = None, mode: CUDAGraphMode = M.PIECEWISE
    ) -> None:
        self.backend = HostGraphBackend()
        self.dispatcher = GraphDispatcher(mode, [1, 2, 4, 8], 4)
        self.histogram = BatchHistogram()
        self.plan = CapturePlan(self.dispatcher.capture_order(), 4, first_sizes=first_sizes, histogram=self.histogram)
        self.budget = budget if budget is not None else GraphMemoryBudget()
        self.counters = GraphCounters()
        self.capturer = GraphCapturer(
            self.backend,
            self.dispatcher,
            self.plan,
            self.budget,
            self.run,
            counters=self.counters,
        )
        self.pieces = [
            CUDAGraphWrapper(lambda x: x + 1, M.PIECEWISE, self.backend),
            CUDAGraphWrapper(self._second, M.PIECEWISE, self.backend),
        ]
        self.buffer = torch.ones(8)
        self.runs: list[tuple[CUDAGraphMode, int]] = []
        self.failures: dict[int, Exception] = {}

    def _second(self, x: torch.Tensor) -> torch.Tensor:
        if self.runs[-1][0] is not M.NONE and x.shape[0] in self.failures:
            raise self.failures[x.shape[0]]
        return x * 2

    def run(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        self.runs.append((mode, descriptor.num_tokens))
        with set_forward_context(ForwardContext(None, None, (), mode, descriptor)):
            self.pieces[1](self.pieces[0](self.buffer[: descriptor.num_tokens]))

    def held(self) -> list[list[int]]:
        return [[descriptor.num_tokens for descriptor in piece.captured_descriptors()] for piece in self.pieces]

    def servable(self) -> list[int]:
        return [descriptor.num_tokens for _, descriptor in self.dispatcher.captured_keys()]


def test_first_set_then_one_capture_per_idle_gap() -> None:
    setup = Setup()
    setup.capturer.capture_first_set()
    assert setup.runs == [(mode, size) for size in (4, 2, 1) for mode in (M.NONE, M.PIECEWISE)]
    assert setup.plan.is_ready
    assert setup.held() == [[4, 2, 1]] * 2
    setup.capturer.capture_first_set()
    assert len(setup.runs) == 6
    assert not setup.capturer.capture_next(idle=False)
    assert setup.servable() == [4, 2, 1]
    assert setup.capturer.capture_next(idle=True)
    assert setup.servable() == [8, 4, 2, 1]
    assert setup.runs[6:] == [(M.NONE, 8), (M.PIECEWISE, 8)]
    assert not setup.capturer.capture_next(idle=True)
    assert setup.plan.is_done


def test_a_failure_in_the_first_set_is_an_error() -> None:
    setup = Setup()
    setup.failures[2] = RuntimeError("kernel not capturable")
    with pytest.raises(RuntimeError, match="kernel not capturable"):
        setup.capturer.capture_first_set()
    assert setup.held() == [[4]] * 2
    assert not setup.backend.is_capturing_allowed


def test_a_failure_in_an_idle_gap_is_left_out_and_its_pieces_dropped(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup()
    setup.capturer.capture_first_set()
    setup.failures[8] = RuntimeError("kernel not capturable")
    with caplog.at_level(logging.WARNING):
        assert setup.capturer.capture_next(idle=True)
    assert "kernel not capturable" in caplog.text
    assert setup.held() == [[4, 2, 1]] * 2
    assert setup.servable() == [4, 2, 1]
    assert list(setup.plan.dropped.values()) == ["the capture failed: kernel not capturable"]
    assert setup.plan.is_done


def test_a_busy_engine_gets_what_it_misses_one_capture_at_a_time() -> None:
    setup = Setup(first_sizes=[8])
    setup.capturer.capture_first_set()
    setup.histogram.record(1, 2, is_decode=False)
    assert setup.capturer.capture_needed()
    assert setup.servable() == [8, 2]
    setup.histogram.record(1, 1, is_decode=False)
    assert setup.capturer.capture_needed()
    assert not setup.capturer.capture_needed()  # 4 is pending, but no batch would gain from it
    assert setup.servable() == [8, 2, 1]
    assert 0 < setup.counters.first_warm_up_seconds <= setup.counters.warm_up_seconds


def test_a_failure_under_load_is_left_out() -> None:
    setup = Setup(first_sizes=[8])
    setup.capturer.capture_first_set()
    setup.histogram.record(1, 2, is_decode=False)
    setup.failures[2] = RuntimeError("kernel not capturable")
    assert setup.capturer.capture_needed()
    assert setup.held() == [[8]] * 2
    assert list(setup.plan.dropped.values()) == ["the capture failed: kernel not capturable"]
    assert setup.capturer.capture_needed()
    assert setup.servable() == [8, 4]  # the next best for that batch


def test_pieces_that_a_full_graph_of_the_same_size_warmed_up_are_not_run_again() -> None:
    setup = Setup(mode=M.FULL_AND_PIECEWISE)
    setup.capturer.capture_first_set()
    assert setup.runs == [(mode, size) for size in (4, 2, 1) for mode in (M.NONE, M.FULL, M.PIECEWISE)]
    assert setup.capturer.capture_next(idle=True)
    assert setup.runs[-2:] == [(M.NONE, 8), (M.PIECEWISE, 8)]


def test_other_exceptions_in_an_idle_gap_are_not_hidden() -> None:
    setup = Setup(first_sizes=[])
    setup.failures[8] = KeyError("a bug")
    with pytest.raises(KeyError):
        setup.capturer.capture_next(idle=True)
    assert setup.held() == [[], []]


def test_running_out_of_memory_shrinks_the_first_set(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup(first_sizes="all")
    setup.failures[8] = torch.OutOfMemoryError("CUDA out of memory")
    with caplog.at_level(logging.WARNING):
        setup.capturer.capture_first_set()
    assert setup.servable() == [4, 2, 1]
    assert setup.held() == [[4, 2, 1]] * 2
    assert "no memory for the PIECEWISE graph of 8 tokens" in caplog.text


def test_memory_limit_as_an_error() -> None:
    setup = Setup(first_sizes="all", budget=GraphMemoryBudget(10, MemoryPolicy.ERROR))
    with pytest.raises(ConfigError, match="above the limit"):
        setup.capturer.capture_first_set()
    # In an idle gap the replica is serving: what does not fit is left out.
    setup = Setup(first_sizes=[], budget=GraphMemoryBudget(20, MemoryPolicy.ERROR))
    while setup.capturer.capture_next(idle=True):
        pass
    assert setup.servable() == [2, 1]
    assert len(setup.plan.dropped) == 2


def test_clear_starts_over() -> None:
    setup = Setup()
    setup.capturer.capture_first_set()
    setup.capturer.clear()
    assert setup.held() == [[], []]
    assert setup.servable() == []
    assert setup.backend.bytes_held() == setup.budget.total_bytes == 0
    setup.capturer.capture_first_set()
    assert setup.servable() == [4, 2, 1]
