"""The gate between an ingress and its replicas: requests pass as these have room, and wait in fair order until then.

A replica has room up to its batch and a short queue of its own, so that a place that becomes free is taken in its next
step. Everything else waits here, where it can still be ordered by key, refused, or taken back. Requests that lost
their replica wait in front of all others, but here too: whoever waits inside an engine is a suspect when it dies. Knows
places and futures; which replica a request goes to is the fleet's business.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable

from cluster.admission.waiting_room import WaitingRoom
from cluster.autoscaling.arrivals import ArrivalMeter
from cluster.config import ReplicaConfig
from cluster.messages import GenerateRequest, IngressLoad
from cluster.routing.snapshot import ReplicaSnapshot
from workers.errors import EngineDeadError


def num_tokens_of(request: GenerateRequest) -> int:
    """What a request counts for: its prompt, and the most that it may generate."""
    return len(request.prompt_token_ids) + (request.params.max_tokens or 0)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    is_called: asyncio.Future[None]


class Gate:
    """Lets requests through.

    Args:
        replicas: The connected replicas now.
        config: How many may wait, where, and for how long.
        wake: Called when a request waits and there is no replica.
    """

    def __init__(
        self,
        replicas: Callable[[], list[ReplicaSnapshot]],
        config: ReplicaConfig,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._replicas = replicas
        self._config = config
        self._room: WaitingRoom[_Ticket] = WaitingRoom(time.monotonic, config.max_queued_tokens)
        self._arrivals = ArrivalMeter(time.monotonic)
        self._lost: collections.deque[_Ticket] = collections.deque()
        self._num_prompt_tokens = 0
        self._passing: set[str] = set()
        self._wake = wake
        self._begins_to_hold = asyncio.Event()

    @property
    def num_waiting(self) -> int:
        """Requests that wait here."""
        return len(self._room) + len(self._lost)

    def load(self) -> IngressLoad:
        """What waits here and what comes in, for the autoscaler."""
        num_prompt_tokens = self._num_prompt_tokens + sum(ticket.num_prompt_tokens for ticket in self._lost)
        num_output_tokens = self._room.num_tokens - self._num_prompt_tokens
        num_output_tokens += sum(ticket.num_output_tokens for ticket in self._lost)
        return self._arrivals.load(self.num_waiting, num_prompt_tokens, num_output_tokens)

    async def wait_for_news(self, timeout_s: float) -> None:
        """Return once requests have begun to wait since the last call, and at the latest after ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._begins_to_hold.wait()
        self._begins_to_hold.clear()

    def has_room(self, replica: ReplicaSnapshot) -> bool:
        """Whether one more request may go to a replica."""
        return self._num_places(replica) > 0

    async def enter(self, request: GenerateRequest) -> None:
        """Wait until the request may go to a replica. :meth:`passed` must follow, whatever happens.

        Raises:
            QueueFullError: Too many wait already.
            EngineDeadError: There is no replica, and none became ready in time.
        """
        num_tokens = num_tokens_of(request)
        num_prompt_tokens = len(request.prompt_token_ids)
        self._arrivals.arrive(num_prompt_tokens, num_tokens - num_prompt_tokens)
        if not self.num_waiting and self._num_free() > 0:
            self._passing.add(request.request_id)
            self._room.note_passed(num_tokens)
            return
        # One that was lost is being replaced: its share of the queue stays.
        max_requests = self._config.max_queued_requests * max(1, len(self._replicas()), self._config.num_replicas)
        ticket = _make_ticket(request)
        self._room.enter(ticket, request.key_name, request.weight, num_tokens, max_requests)
        self._num_prompt_tokens += num_prompt_tokens
        try:
            await self._wait(ticket)
        finally:
            if self._room.leave(ticket):
                self._num_prompt_tokens -= num_prompt_tokens

    async def enter_again(self, request: GenerateRequest) -> None:
        """The same for a request that lost its replica: before all others, and never refused."""
        if not self._lost and self._num_free() > 0:
            self._passing.add(request.request_id)
            return
        ticket = _make_ticket(request)
        self._lost.append(ticket)
        try:
            await self._wait(ticket)
        finally:
            with contextlib.suppress(ValueError):
                self._lost.remove(ticket)

    async def _wait(self, ticket: _Ticket) -> None:
        if self.num_waiting == 1:
            self._begins_to_hold.set()
        if not self._replicas():
            self._wake()
        while not ticket.is_called.done():
            await asyncio.wait([ticket.is_called], timeout=self._config.start_timeout_s)
            if not ticket.is_called.done() and not self._replicas():
                raise EngineDeadError(
                    f"No replica was ready within {self._config.start_timeout_s:.0f} s; try again later."
                )

    def passed(self, request_id: str) -> None:
        """A request is about to show in a replica's numbers, or has gone; others may look for a place after that."""
        if request_id in self._passing:
            self._passing.remove(request_id)
            if self.num_waiting:
                asyncio.get_running_loop().call_soon(self.open)

    def open(self) -> None:
        """Let through as many as there are places; called whenever a replica has news."""
        while self.num_waiting and self._num_free() > 0:
            if self._lost:
                ticket = self._lost.popleft()
            else:
                called = self._room.call_next()
                assert called is not None
                ticket = called
                self._num_prompt_tokens -= ticket.num_prompt_tokens
            self._passing.add(ticket.request_id)
            ticket.is_called.set_result(None)

    def finish(self, request: GenerateRequest, num_generated: int) -> None:
        """A request ended by itself; it may have generated less than it was counted for."""
        max_tokens = request.params.max_tokens or 0
        self._arrivals.finish(max_tokens, num_generated)
        self._room.give_back(request.key_name, max(0, max_tokens - num_generated))

    def _num_free(self) -> int:
        return sum(map(self._num_places, self._replicas())) - len(self._passing)

    def _num_places(self, replica: ReplicaSnapshot) -> int:
        max_num_seqs = replica.state.max_num_seqs
        backlog = self._config.engine_backlog
        if backlog is None:
            backlog = max(1, max_num_seqs // 8)
        return max(0, max_num_seqs + backlog - replica.num_requests)


def _make_ticket(request: GenerateRequest) -> _Ticket:
    num_prompt_tokens = len(request.prompt_token_ids) + len(request.resume_token_ids)
    num_output_tokens = max(0, num_tokens_of(request) - num_prompt_tokens)
    return _Ticket(request.request_id, num_prompt_tokens, num_output_tokens, asyncio.get_running_loop().create_future())
