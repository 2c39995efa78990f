"""Requests that may be what kills replicas: how often each is tried, and when it is refused.

A replica that dies takes all its requests with it, and nobody can say which of them, if any, was the cause. So a
death counts against every request that ran there, and a few tokens beyond the place where it died clear it: what
kills a replica does so at the same place again. The first retry runs beside others. The last one runs alone: at most
one request with two deaths is in flight at a time, so that a poisoned request cannot take innocent ones down with it
three times. After its third death it is refused, also when a client sends the same again. Deaths are counted by a
digest of prompt and parameters, for that reason. Knows requests and deaths, no replicas.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from cluster.serving.failover import ResumableRequest
from workers.errors import PoisonedRequestError

#: Deaths in one place after which a request is refused: it was sent, and retried twice.
MAX_DEATHS = 3
#: A death may swallow the last tokens before it: steps in flight, and a message on its way.
_MARGIN_TOKENS = 4
#: How long deaths are remembered, in seconds, and of how many requests.
_MEMORY_S = 600.0
_MEMORY_REQUESTS = 4096


@dataclasses.dataclass(slots=True)
class _Record:
    """Deaths of one digest.

    Attributes:
        last_s: Time of the last one.
        num_tokens: Most output tokens that one of its requests had when it died.
        deaths: Their ids: requests that die together, say the choices of one prompt, die once.
    """

    last_s: float
    num_tokens: int = 0
    deaths: set[str] = dataclasses.field(default_factory=set)


class Turn:
    """One attempt of a request.

    Args:
        alone: Held if no other suspect may be tried meanwhile.
    """

    def __init__(self, alone: asyncio.Lock | None = None) -> None:
        self._alone = alone

    @property
    def is_alone(self) -> bool:
        """Whether others wait for its end."""
        return self._alone is not None

    def end(self) -> None:
        """Let others be tried: the request is cleared, or its attempt is over."""
        if self._alone is not None:
            self._alone.release()
            self._alone = None


class Suspects:
    """What one ingress knows of the deaths of one model's replicas.

    Args:
        on_refusal: Told the digest of a request that is not tried again.
        clock: Seconds, monotonic.

    Attributes:
        refused_elsewhere: Digests of requests that other ingresses do not try again; filled by the fleet.
    """

    def __init__(
        self, on_refusal: Callable[[bytes], None] = lambda digest: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.refused_elsewhere: frozenset[bytes] = frozenset()
        self._on_refusal = on_refusal
        self._clock = clock
        self._records: collections.OrderedDict[bytes, _Record] = collections.OrderedDict()
        self._alone = asyncio.Lock()

    @property
    def has_any(self) -> bool:
        """Whether anything died lately; while not, nobody needs a digest."""
        return bool(self._records)

    def note_death(self, request: ResumableRequest, death: str) -> None:
        """A replica died under a request; ``death`` names the event."""
        record = self._find(request) or _Record(0.0)
        self._records.pop(request.digest, None)
        record.last_s = self._clock()
        record.num_tokens = max(record.num_tokens, request.num_tokens)
        record.deaths.add(death)
        self._records[request.digest] = record
        if len(record.deaths) == MAX_DEATHS:
            self._on_refusal(request.digest)
        while len(self._records) > _MEMORY_REQUESTS:
            self._records.popitem(last=False)

    def is_cleared(self, request: ResumableRequest) -> bool:
        """Whether nothing is held against a request that has just made progress (any more)."""
        record = self._records.get(request.digest)
        if record is None:
            return True
        if not request.is_finished and request.num_tokens <= record.num_tokens + _MARGIN_TOKENS:
            return False
        del self._records[request.digest]
        return True

    @asynccontextmanager
    async def turn(self, request: ResumableRequest) -> AsyncIterator[Turn]:
        """Wait until a request may be tried, and keep others from it as long as it is tried alone.

        Raises:
            PoisonedRequestError: It may not be tried (again).
        """
        if not self._is_last_try(request):
            yield Turn()
            return
        await self._alone.acquire()
        turn = Turn(self._alone)
        try:
            if not self._is_last_try(request):  # another one like it has had its turn meanwhile
                turn.end()
            yield turn
        finally:
            turn.end()

    def _is_last_try(self, request: ResumableRequest) -> bool:
        return self._check(request) == MAX_DEATHS - 1

    def _check(self, request: ResumableRequest) -> int:
        """The number of deaths, which must be small enough."""
        record = self._find(request) if self._records else None
        num_deaths = 0 if record is None else len(record.deaths)
        if self.refused_elsewhere and request.digest in self.refused_elsewhere:
            num_deaths = MAX_DEATHS
        if num_deaths >= MAX_DEATHS:
            raise PoisonedRequestError(
                f"{num_deaths} replicas died at the same place of this request, so it is not tried again; "
                "change the prompt or the parameters."
            )
        return num_deaths

    def _find(self, request: ResumableRequest) -> _Record | None:
        record = self._records.get(request.digest)
        return record if record is not None and self._clock() - record.last_s < _MEMORY_S else None
