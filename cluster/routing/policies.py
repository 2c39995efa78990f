"""Routing policies: pure functions from what is known of the replicas to a choice.

They see a snapshot and return a replica id, so they are tested without a cluster. Knows nothing about Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from cluster.messages import ReplicaState


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """One replica as the router sees it when a request arrives.

    Attributes:
        replica_id: Serve's unique id.
        state: What the replica last reported.
        unreported_requests: Requests sent since that report: the state does not show them yet.
        unreported_tokens: Their tokens.
    """

    replica_id: str
    state: ReplicaState
    unreported_requests: int = 0
    unreported_tokens: int = 0

    @property
    def outstanding_tokens(self) -> int:
        """Work queued in the replica, in tokens."""
        return self.state.outstanding_tokens + self.unreported_tokens

    @property
    def num_requests(self) -> int:
        """Requests running or waiting there."""
        return self.state.num_running + self.state.num_waiting + self.unreported_requests


@dataclasses.dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What a policy may know of the request.

    Attributes:
        num_tokens: Prompt tokens.
        sequence: Counts the requests that this router has routed.
    """

    num_tokens: int
    sequence: int


#: ``policy(request, replicas) -> replica_id``; ``replicas`` is not empty.
RoutingPolicy = Callable[[RoutingRequest, Sequence[ReplicaSnapshot]], str]


def least_loaded(request: RoutingRequest, replicas: Sequence[ReplicaSnapshot]) -> str:
    """The replica with the fewest outstanding tokens; ties go to fewer requests, then in turn."""
    start = request.sequence % len(replicas)
    in_turn = [*replicas[start:], *replicas[:start]]
    return min(in_turn, key=lambda r: (r.outstanding_tokens, r.num_requests)).replica_id


def round_robin(request: RoutingRequest, replicas: Sequence[ReplicaSnapshot]) -> str:
    """Each replica in turn, whatever its load."""
    return sorted(r.replica_id for r in replicas)[request.sequence % len(replicas)]


POLICIES: dict[str, RoutingPolicy] = {"least_loaded": least_loaded, "round_robin": round_robin}
