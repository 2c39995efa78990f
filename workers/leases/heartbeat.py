"""Keeps a lease alive from a thread while its owner works."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Self

from workers.leases.base import Lease, LeaseService, LeaseUnavailableError

logger = logging.getLogger(__name__)


class Heartbeat:
    """Use it as a context manager around the work.

    Args:
        period_s: Time between beats.
        longest_s: After this the work counts as stuck: beating stops, so that somebody else takes over.
    """

    def __init__(self, leases: LeaseService, lease: Lease, period_s: float, longest_s: float) -> None:
        self._leases = leases
        self._lease = lease
        self._period_s = period_s
        self._beats_left = max(int(longest_s / period_s), 1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-heartbeat", daemon=True)
        self.is_lost = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def still_holds(self) -> bool:
        """Ask once more: whether the lease is still its owner's, so that it may publish."""
        if not self.is_lost:
            self.is_lost = not self._leases.heartbeat(self._lease)
        return not self.is_lost

    def _run(self) -> None:
        while self._beats_left > 0 and not self._stopped.wait(self._period_s):
            self._beats_left -= 1
            try:
                if not self.still_holds():
                    logger.warning("the lease of %s was taken over", self._lease.name)
                    return
            except LeaseUnavailableError as error:
                logger.warning("no heartbeat for %s: %s", self._lease.name, error)
