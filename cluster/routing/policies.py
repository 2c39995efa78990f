"""Routing policies: pure functions from what is known of the replicas to a choice.

They see snapshots and return a replica id, so they are tested without a cluster (``benchmarks/routing.py`` compares
them on simulated replicas). Knows nothing about Ray. Where replicas are equal, they take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.routing.snapshot import ReplicaSnapshot, RoutingRequest

#: ``policy(request, replicas) -> replica_id``; ``replicas`` is not empty.
RoutingPolicy = Callable[[RoutingRequest, Sequence[ReplicaSnapshot]], str]

#: ``prefix_affinity`` leaves a replica alone whose queued tokens exceed this many times the average.
_LOAD_BOUND = 1.5
#: Decode steps for which ``balanced`` looks ahead: how long a request will run is not known.
_MAX_STEPS_AHEAD = 64
#: What ``balanced`` adds to a prompt's cost for every request that it holds up. Of 0, 1/4 and 1 the middle was best
#: over all loads that ``benchmarks/routing.py`` was run with: 1 doubles the worst waits of short prompts.
_HOLD_UP = 0.25


def round_robin(request: RoutingRequest, replicas: Sequence[ReplicaSnapshot]) -> str:
    """Each replica in turn, whatever its load."""
    return sorted(r.replica_id for r in replicas)[request.sequence % len(replicas)]


def least_loaded(request: RoutingRequest, replicas: Sequence[ReplicaSnapshot]) -> str:
    """The replica with the fewest outstanding tokens; ties go to fewer requests."""
    return min(_in_turn(request, replicas), key=lambda r: (r.outstanding_tokens, r.num_requests)).replica_id


def prefix_affinity(request: RoutingRequest, replicas: Sequence[ReplicaSnapshot]) -> str:
    """The replica that holds most of the prompt, among those that are not much busier than the average.

    A full batch counts as busy while another replica has room. Of equal prefixes the least loaded replica wins.
    """
    average = sum(r.outstanding_tokens for r in replicas) / len(replicas)
    bound = _LOAD_BOUND * average + request.num_tokens
    candidates = _with_room([r for r in replicas if r.outstanding_tokens <= bound])
    best = max(r.cached_tokens for r in candidates)
    return least_loaded(request, [r for r in candidates if r.cached_tokens == best])


def capture_aware(request: RoutingRequest, replicas: Sequence[ReplicaSnapshot]) -> str:
    """The replica whose padded decode batch grows least.

    A batch that runs in a graph for 16 computes 16 rows, whether 9 or 16 requests are in it: rows that are computed
    anyway are filled before another replica opens its next size. Among equals the least loaded replica wins.
    """

    def growth(replica: ReplicaSnapshot) -> int:
        num_requests = replica.num_requests
        return replica.padded(num_requests + 1) - replica.padded(num_requests)

    candidates = _with_room(replicas)
    least = min(growth(r) for r in candidates)
    return least_loaded(request, [r for r in candidates if growth(r) == least])


def balanced(request: RoutingRequest, replicas: Sequence[ReplicaSnapshot]) -> str:
    """The replica that computes the fewest tokens until the request is done: prefix, padding and load in one sum.

    Before the first token it computes what is queued there and the part of the prompt that is not cached, which holds
    up the requests beside it too; then, for every step, the padded batch with the request in it. A request that finds
    the batch full waits for others to leave.
    """
    num_steps = min(request.max_tokens, _MAX_STEPS_AHEAD)

    def cost(replica: ReplicaSnapshot) -> float:
        max_num_seqs = replica.state.max_num_seqs
        batch = min(replica.num_requests + 1, max_num_seqs)
        num_ahead = replica.num_requests + 1 - batch
        uncached = request.num_tokens - replica.cached_tokens
        prefill = replica.outstanding_tokens + uncached * (1 + _HOLD_UP * (batch - 1))
        return prefill + replica.padded(batch) * num_steps * (1 + num_ahead / max_num_seqs)

    return min(_in_turn(request, replicas), key=cost).replica_id


def _in_turn(request: RoutingRequest, replicas: Sequence[ReplicaSnapshot]) -> list[ReplicaSnapshot]:
    """The replicas, starting with another one for every request: ``min`` takes the first of equals."""
    start = request.sequence % len(replicas)
    return [*replicas[start:], *replicas[:start]]


def _with_room(replicas: Sequence[ReplicaSnapshot]) -> Sequence[ReplicaSnapshot]:
    """Those with a free place in the batch, or all if none has."""
    return [r for r in replicas if r.has_free_slot] or replicas
