"""Routing policies as pure functions."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.routing import policies
from cluster.routing.policies import RoutingPolicy, balanced, capture_aware, least_loaded, prefix_affinity, round_robin
from cluster.routing.registry import POLICIES, load_policy
from cluster.routing.snapshot import ReplicaSnapshot, RoutingRequest
from tests.replica_states import replica_state
from workers.errors import ConfigError

SIZES = (1, 2, 4, 8, 16)


def snapshot(
    replica_id: str,
    outstanding: int = 0,
    running: int = 0,
    unreported: int = 0,
    *,
    cached: int = 0,
    max_num_seqs: int = 16,
    sizes: tuple[int, ...] = (),
) -> ReplicaSnapshot:
    state = replica_state(
        num_running=running, outstanding_tokens=outstanding, max_num_seqs=max_num_seqs, decode_sizes=sizes
    )
    return ReplicaSnapshot(replica_id, state, int(unreported > 0), unreported, cached)


@st.composite
def fleets(draw: st.DrawFn) -> list[ReplicaSnapshot]:
    sizes = draw(st.sampled_from([(), SIZES]))
    return [
        snapshot(
            f"r{index}",
            draw(st.integers(0, 999)),
            draw(st.integers(0, 20)),
            draw(st.sampled_from([0, 0, 30])),
            cached=draw(st.integers(0, 6)) * 16,
            sizes=sizes,
        )
        for index in range(draw(st.integers(1, 8)))
    ]


requests = st.builds(RoutingRequest, st.integers(97, 400), st.integers(0, 1000), st.integers(1, 200))


def by_id(replicas: list[ReplicaSnapshot], policy: RoutingPolicy, request: RoutingRequest) -> ReplicaSnapshot:
    (chosen,) = [r for r in replicas if r.replica_id == policy(request, replicas)]
    return chosen


def test_least_loaded_counts_tokens_not_requests() -> None:
    replicas = [snapshot("a", outstanding=1000, running=1), snapshot("b", outstanding=10, running=7)]
    assert least_loaded(RoutingRequest(5, 0), replicas) == "b"


def test_least_loaded_counts_what_was_just_sent() -> None:
    replicas = [snapshot("a", outstanding=0, unreported=200), snapshot("b", outstanding=100)]
    assert least_loaded(RoutingRequest(5, 0), replicas) == "b"


@pytest.mark.parametrize("name", POLICIES)
def test_equal_replicas_take_turns(name: str) -> None:
    replicas = [snapshot("a"), snapshot("b"), snapshot("c")]
    chosen = Counter(POLICIES[name].choose(RoutingRequest(5, sequence), replicas) for sequence in range(9))
    assert set(chosen.values()) == {3}


@settings(deadline=None)
@given(fleets(), requests)
def test_every_policy_picks_one_of_the_replicas_and_repeats_itself(
    replicas: list[ReplicaSnapshot], request: RoutingRequest
) -> None:
    for policy in POLICIES.values():
        chosen = policy.choose(request, replicas)
        assert chosen in {r.replica_id for r in replicas}
        assert policy.choose(request, replicas) == chosen


@settings(deadline=None)
@given(fleets(), requests)
def test_affinity_takes_the_longest_prefix_within_its_bound(
    replicas: list[ReplicaSnapshot], request: RoutingRequest
) -> None:
    chosen = by_id(replicas, prefix_affinity, request)
    bound = 1.5 * sum(r.outstanding_tokens for r in replicas) / len(replicas) + request.num_tokens
    assert chosen.outstanding_tokens <= bound
    rivals = [r for r in replicas if r.outstanding_tokens <= bound and (r.has_free_slot or not chosen.has_free_slot)]
    assert chosen.cached_tokens == max(r.cached_tokens for r in rivals)


def test_affinity_leaves_a_busy_replica_alone() -> None:
    replicas = [snapshot("warm", outstanding=5000, cached=160), snapshot("idle")]
    assert prefix_affinity(RoutingRequest(200, 0), replicas) == "idle"
    replicas = [snapshot("warm", outstanding=150, cached=160), snapshot("idle")]
    assert prefix_affinity(RoutingRequest(200, 0), replicas) == "warm"


@settings(deadline=None)
@given(fleets(), requests)
def test_rows_that_are_computed_anyway_are_filled_first(
    replicas: list[ReplicaSnapshot], request: RoutingRequest
) -> None:
    def grows(replica: ReplicaSnapshot) -> bool:
        return replica.padded(replica.num_requests + 1) > replica.padded(replica.num_requests)

    with_room = [r for r in replicas if r.has_free_slot]
    chosen = by_id(replicas, capture_aware, request)
    assert not with_room or chosen.has_free_slot
    assert not grows(chosen) or all(grows(r) for r in with_room or replicas)


def test_capture_sizes_are_filled_one_after_the_other() -> None:
    """20 requests on two replicas with graphs for 8 and 16: no row is padded that need not be."""
    batch = {"a": 0, "b": 0}
    for sequence in range(20):
        replicas = [snapshot(name, outstanding=size, running=size, sizes=(8, 16)) for name, size in batch.items()]
        batch[capture_aware(RoutingRequest(5, sequence), replicas)] += 1
    assert sorted(batch.values()) == [8, 12]


def test_a_batch_beyond_the_largest_graph_counts_double() -> None:
    replica = snapshot("a", sizes=(1, 2, 4))
    assert [replica.padded(n) for n in (0, 1, 3, 4, 5)] == [0, 1, 4, 4, 10]
    assert snapshot("a").padded(5) == 5


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (snapshot("worse"), snapshot("better", cached=64)),
        (snapshot("worse", outstanding=500, cached=64), snapshot("better")),
        (snapshot("worse", outstanding=4, running=4, sizes=SIZES), snapshot("better", 5, 5, sizes=(5, 6))),
        (snapshot("worse", outstanding=16, running=16), snapshot("better", outstanding=15, running=15)),
        (snapshot("worse", outstanding=16, running=16, cached=64), snapshot("better", running=4, outstanding=4)),
        (snapshot("worse", outstanding=16, running=24), snapshot("better", outstanding=16, running=18)),
    ],
    ids=["prefix", "prefix behind a queue", "padding", "full batch", "prefix in a full batch", "queue"],
)
def test_balanced_weighs_prefix_padding_and_load(worse: ReplicaSnapshot, better: ReplicaSnapshot) -> None:
    for order in ([worse, better], [better, worse]):
        for sequence in range(2):
            assert balanced(RoutingRequest(100, sequence, 32), order) == "better"


def test_policies_are_found_by_name_or_import_path() -> None:
    assert load_policy("round_robin").choose is round_robin
    own = load_policy(f"{policies.__name__}:least_loaded")
    assert own.choose is least_loaded
    assert own.reads_prefix, "who knows what it reads"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fastest", "'fastest' is not one of balanced, least_loaded"),
        ("no.such.module:policy", "cannot import 'no.such.module:policy'"),
        ("cluster.routing.policies:nothing", "cannot import"),
        ("cluster.routing.policies:_LOAD_BOUND", "is not a function"),
    ],
)
def test_a_policy_that_is_not_there_is_named(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_policy(name)
