"""The memory budget: estimates, the limit, and both policies."""

from __future__ import annotations

import logging

import pytest

from workers.errors import ConfigError
from workers.graphs import BatchDescriptor, CUDAGraphMode, GraphMemoryBudget, MemoryPolicy

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
MIB = 1 << 20


def _full(num_tokens: int) -> BatchDescriptor:
    return BatchDescriptor(num_tokens, num_tokens, True)


def test_without_a_limit_everything_fits() -> None:
    budget = GraphMemoryBudget()
    assert budget.admit(FULL, _full(8))
    assert budget.record(FULL, _full(8), 10**15)
    assert budget.total_bytes == 10**15
    assert budget.bytes_by_key() == {(FULL, _full(8)): 10**15}


def test_estimates_follow_from_what_the_mode_added_so_far() -> None:
    budget = GraphMemoryBudget()
    assert budget.estimate(FULL, _full(64)) == 0
    budget.record(FULL, _full(64), 640)
    assert budget.estimate(PIECEWISE, BatchDescriptor(64)) == 0
    assert budget.estimate(FULL, _full(32)) == 0  # fits in what the larger one took
    assert budget.estimate(FULL, _full(96)) == 320  # 10 bytes per token
    budget.record(FULL, _full(32), 5)
    assert budget.estimate(FULL, _full(16)) == 5
    assert budget.estimate(FULL, _full(65)) == 10


def test_shrink_leaves_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    budget = GraphMemoryBudget(100 * MIB)
    with caplog.at_level(logging.WARNING):
        assert not budget.record(FULL, _full(64), 101 * MIB)
        assert budget.record(FULL, _full(32), 60 * MIB)
        assert not budget.admit(FULL, _full(64))
    assert budget.total_bytes == 60 * MIB
    assert [skipped.key for skipped in budget.skipped] == [(FULL, _full(64))] * 2
    assert "added 101.0 MiB to the 0.0 MiB of the others, above the limit of 100.0 MiB" in budget.skipped[0].reason
    assert "is expected to add 60.0 MiB to the 60.0 MiB" in budget.skipped[1].reason
    assert len(caplog.records) == 2


def test_error_says_what_to_change() -> None:
    budget = GraphMemoryBudget(100 * MIB, MemoryPolicy.ERROR)
    budget.record(FULL, _full(32), 60 * MIB)
    with pytest.raises(ConfigError, match="raise cudagraph_memory_limit_bytes or lower") as caught:
        budget.admit(FULL, _full(64))
    assert caught.value.param == "cudagraph_memory_limit_bytes"
    with pytest.raises(ConfigError, match=r"the PIECEWISE graph of 8 tokens added 41\.0 MiB"):
        budget.record(PIECEWISE, BatchDescriptor(8), 41 * MIB)
    assert budget.skipped == []


def test_what_a_given_up_graph_left_in_the_pool_counts() -> None:
    budget = GraphMemoryBudget(100)
    assert budget.record(FULL, _full(8), 50)
    assert not budget.record(FULL, _full(16), 60)
    budget.note_held(110)
    assert budget.total_bytes == 110
    assert not budget.admit(FULL, _full(4))
    budget.clear()
    assert budget.total_bytes == 0
    assert budget.admit(FULL, _full(4))
    assert budget.skipped == []
