"""The bounded queue in front of a model's replicas: who waits, who is next, when to come back.

Knows costs in tokens and the rate at which requests leave; knows nothing about replicas or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Generic, TypeVar

from cluster.admission.fair_queue import FairQueue
from cluster.admission.rate import Clock, RateMeter
from workers.errors import QueueFullError

TicketT = TypeVar("TicketT", bound=Hashable)

#: Tokens that a turn pays for, for a key of weight 1: a few short requests, or a part of a long one.
_QUANTUM = 2048
#: Longest time that a client is told to stay away, in seconds.
_MAX_RETRY_AFTER_S = 60.0
#: What a client is told while nothing has left the queue yet, in seconds.
_UNKNOWN_RETRY_AFTER_S = 5.0


class WaitingRoom(Generic[TicketT]):
    """Requests that wait for a place at a replica.

    Args:
        clock: Where time comes from.
        max_tokens: Most tokens (prompt and output) that may wait; None sets no bound. A request that finds the room
            empty gets in whatever its size.
    """

    def __init__(self, clock: Clock, max_tokens: int | None = None) -> None:
        self._clock = clock
        self._max_tokens = max_tokens or math.inf
        self._queue: FairQueue[TicketT] = FairQueue(_QUANTUM)
        self._requests_per_s = RateMeter(clock)
        self._tokens_per_s = RateMeter(clock)
        self._promised_until_s = clock()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def num_tokens(self) -> int:
        """Tokens, prompt and output, of all who wait."""
        return int(self._queue.cost)

    def enter(self, ticket: TicketT, key_name: str, weight: float, num_tokens: int, max_requests: int) -> None:
        """Start waiting.

        Raises:
            QueueFullError: ``max_requests`` wait already, or too many tokens; says when there will be room at the rate
                at which requests leave now.
        """
        num_excess = len(self) + 1 - max_requests
        excess_tokens = self._queue.cost + num_tokens - self._max_tokens if len(self) else 0.0
        if num_excess > 0 or excess_tokens > 0:
            raise QueueFullError(
                "Every replica is busy and the queue is full; try again later.",
                self._retry_after_s(max(num_excess, 0), max(excess_tokens, 0.0)),
            )
        self._queue.push(key_name, ticket, num_tokens, weight)

    def leave(self, ticket: TicketT) -> bool:
        """Stop waiting without having been called; False if the ticket is not here."""
        return self._queue.discard(ticket)

    def call_next(self) -> TicketT | None:
        """The ticket whose turn it is, taken out; None if nobody waits."""
        before = self._queue.cost
        ticket = self._queue.pop()
        if ticket is not None:
            self.note_passed(before - self._queue.cost)
        return ticket

    def note_passed(self, num_tokens: float) -> None:
        """Count a request that went through, be it without waiting, for the rate."""
        self._requests_per_s.add(1)
        self._tokens_per_s.add(num_tokens)

    def give_back(self, key_name: str, num_tokens: int) -> None:
        """A request that was called used so many tokens less than it had asked for."""
        self._queue.give_back(key_name, num_tokens)

    def _retry_after_s(self, num_excess: int, excess_tokens: float) -> float:
        """When there is room for one more. Whoever is refused after another is told a later time, not the same."""
        rate = self._requests_per_s.per_s()
        if rate <= 0:
            return _UNKNOWN_RETRY_AFTER_S
        wait_s = max(num_excess / rate, excess_tokens / max(self._tokens_per_s.per_s(), 1e-9))
        now_s = self._clock()
        self._promised_until_s = max(now_s + wait_s, self._promised_until_s + 1.0 / rate)
        self._promised_until_s = min(self._promised_until_s, now_s + _MAX_RETRY_AFTER_S)
        return max(self._promised_until_s - now_s, 1.0)
