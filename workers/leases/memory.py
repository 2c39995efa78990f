"""Leases within one process, for tests and for engines that share nothing with others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from workers.leases.base import DEFAULT_TTL_S, HeldBy, Lease
from workers.leases.table import LeaseTable


class MemoryLeases:
    """A :class:`LeaseTable` that threads may share.

    Args:
        ttl_s: See the table, as for ``clock``.
    """

    def __init__(self, ttl_s: float = DEFAULT_TTL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._table = LeaseTable(ttl_s, clock)
        self._lock = threading.Lock()

    def acquire(self, name: str, owner: str) -> Lease | HeldBy:
        """See :class:`workers.leases.base.LeaseService`, as for the other calls."""
        with self._lock:
            return self._table.acquire(name, owner)

    def heartbeat(self, lease: Lease) -> bool:
        """Keep a lease."""
        with self._lock:
            return self._table.heartbeat(lease)

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        with self._lock:
            self._table.release(lease)

    def holder(self, name: str) -> HeldBy | None:
        """Who has it."""
        with self._lock:
            return self._table.holder(name)
