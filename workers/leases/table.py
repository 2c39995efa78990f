"""The state of a lease service, as a plain object with a clock handed in.

Both the in-memory service and the cluster's actor are this table behind a door. Knows nothing of threads or transport.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Self

from workers.leases.base import DEFAULT_TTL_S, HeldBy, Lease


@dataclasses.dataclass(slots=True)
class _Record:
    owner: str
    token: int
    since_s: float
    beat_s: float


class LeaseTable:
    """Leases by name.

    Args:
        ttl_s: A holder that is not heard of for this long is taken over.
        clock: Monotonic seconds.
    """

    def __init__(self, ttl_s: float = DEFAULT_TTL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.ttl_s = ttl_s
        self._clock = clock
        self._records: dict[str, _Record] = {}
        self._last_token = 0

    def acquire(self, name: str, owner: str) -> Lease | HeldBy:
        """See :class:`workers.leases.base.LeaseService`, as for the other calls."""
        record = self._live(name)
        now = self._clock()
        if record is not None and record.owner != owner:
            return HeldBy(record.owner, record.token, now - record.since_s)
        if record is None:
            self._last_token += 1
            record = self._records[name] = _Record(owner, self._last_token, now, now)
        return Lease(name, owner, record.token)

    def heartbeat(self, lease: Lease) -> bool:
        """A holder that comes back after its time, before anybody took over, has the lease still."""
        record = self._records.get(lease.name)
        if record is None or record.token != lease.token:
            return False
        record.beat_s = self._clock()
        return True

    def release(self, lease: Lease) -> None:
        """Forget it, if it is the current one."""
        record = self._records.get(lease.name)
        if record is not None and record.token == lease.token:
            del self._records[lease.name]

    def holder(self, name: str) -> HeldBy | None:
        """The live holder."""
        record = self._live(name)
        return None if record is None else HeldBy(record.owner, record.token, self._clock() - record.since_s)

    def snapshot(self) -> dict[str, Any]:
        """What must survive a restart, as JSON data."""
        holders = {name: [record.owner, record.token] for name, record in self._records.items()}
        return {"last_token": self._last_token, "holders": holders}

    @classmethod
    def restored(cls, data: dict[str, Any], ttl_s: float, clock: Callable[[], float] = time.monotonic) -> Self:
        """A table from a snapshot. Every holder gets a whole new time to be heard of; tokens go on rising."""
        table = cls(ttl_s, clock)
        now = clock()
        table._last_token = data["last_token"]
        table._records = {name: _Record(owner, token, now, now) for name, (owner, token) in data["holders"].items()}
        return table

    def _live(self, name: str) -> _Record | None:
        record = self._records.get(name)
        if record is not None and self._clock() - record.beat_s > self.ttl_s:
            return None
        return record
