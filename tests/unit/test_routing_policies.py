"""Routing policies as pure functions."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import ReplicaState
from cluster.routing.policies import POLICIES, ReplicaSnapshot, RoutingRequest, least_loaded, round_robin


def snapshot(replica_id: str, outstanding: int = 0, running: int = 0, unreported: int = 0) -> ReplicaSnapshot:
    state = ReplicaState(running, 0, 100, 100, outstanding, 8, 0)
    return ReplicaSnapshot(replica_id, state, int(unreported > 0), unreported)


def test_least_loaded_counts_tokens_not_requests() -> None:
    replicas = [snapshot("a", outstanding=1000, running=1), snapshot("b", outstanding=10, running=7)]
    assert least_loaded(RoutingRequest(5, 0), replicas) == "b"


def test_least_loaded_counts_what_was_just_sent() -> None:
    replicas = [snapshot("a", outstanding=0, unreported=200), snapshot("b", outstanding=100)]
    assert least_loaded(RoutingRequest(5, 0), replicas) == "b"


@pytest.mark.parametrize("policy", [least_loaded, round_robin])
def test_equal_replicas_take_turns(policy: object) -> None:
    assert callable(policy)
    replicas = [snapshot("a"), snapshot("b"), snapshot("c")]
    chosen = Counter(policy(RoutingRequest(5, sequence), replicas) for sequence in range(9))
    assert set(chosen.values()) == {3}


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 64)), min_size=1, max_size=8), st.integers(0, 1000))
def test_every_policy_picks_one_of_the_replicas(loads: list[tuple[int, int]], sequence: int) -> None:
    replicas = [snapshot(f"r{i}", outstanding, running) for i, (outstanding, running) in enumerate(loads)]
    for policy in POLICIES.values():
        assert policy(RoutingRequest(5, sequence), replicas) in {r.replica_id for r in replicas}
