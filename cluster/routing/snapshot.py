"""What a routing policy sees: one replica, and the request. Plain data."""

from __future__ import annotations

import bisect
import dataclasses

from cluster.messages import ReplicaState


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """One replica as the router sees it when a request arrives.

    Attributes:
        replica_id: Serve's unique id.
        state: What the replica last reported.
        unreported_requests: Requests sent since that report: the state does not show them yet.
        unreported_tokens: Their tokens.
        cached_tokens: How much of the request's prompt is in the replica's prefix cache; 0 for a policy that does not
            ask for it.
    """

    replica_id: str
    state: ReplicaState
    unreported_requests: int = 0
    unreported_tokens: int = 0
    cached_tokens: int = 0

    @property
    def outstanding_tokens(self) -> int:
        """Work queued in the replica, in tokens."""
        return self.state.outstanding_tokens + self.unreported_tokens

    @property
    def num_requests(self) -> int:
        """Requests running or waiting there."""
        return self.state.num_running + self.state.num_waiting + self.unreported_requests

    @property
    def has_free_slot(self) -> bool:
        """Whether one more request would get into the batch."""
        return self.num_requests < self.state.max_num_seqs

    def padded(self, num_requests: int) -> int:
        """Rows that a decode batch of ``num_requests`` computes.

        Above the largest captured size a batch runs unpadded, but without its graph; that counts as if it were twice
        as large, because launching every kernel costs about as much as the rows do.
        """
        sizes = self.state.decode_sizes
        if not sizes or num_requests == 0:
            return num_requests
        index = bisect.bisect_left(sizes, num_requests)
        return sizes[index] if index < len(sizes) else 2 * num_requests


@dataclasses.dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What a policy may know of the request.

    Attributes:
        num_tokens: Prompt tokens.
        sequence: Counts the requests that this router has routed.
        max_tokens: Most tokens to generate.
    """

    num_tokens: int
    sequence: int
    max_tokens: int = 16
