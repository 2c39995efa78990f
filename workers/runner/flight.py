"""Single flight for compiled pieces: the compile layer's steps under a lease, and the leases that need no cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable

from workers.artifacts.stores.factory import store_folder
from workers.checkpoint.cache import artifacts_root
from workers.compile.piece_set import PieceSet
from workers.config import ArtifactConfig
from workers.leases.base import LeaseService
from workers.leases.files import FileLeases
from workers.leases.memory import MemoryLeases
from workers.leases.single_flight import FlightPolicy, Work, single_flight
from workers.startup.account import StartupAccount

logger = logging.getLogger(__name__)


def leases_of(config: ArtifactConfig) -> LeaseService:
    """Leases for replicas without a cluster: beside a store that is a folder, else on this node."""
    if config.store is None:
        return MemoryLeases()
    root = artifacts_root()
    return FileLeases((store_folder(config.store, root) or root) / "leases")


class PieceFlight:
    """A ``workers.compile.compilation.BuildFlight``.

    Args:
        leases: Who builds.
        wait_s: Longest wait for somebody else's build.
        account: Where waiting is written down.
        on_miss: Called before the first wait or build: the pieces were not there.
    """

    def __init__(
        self, leases: LeaseService, wait_s: float, account: StartupAccount, on_miss: Callable[[], None] = lambda: None
    ) -> None:
        self._leases = leases
        self._policy = FlightPolicy(deadline_s=wait_s)
        self._account = account
        self._on_miss = on_miss

    def __call__(
        self,
        name: str,
        find: Callable[[], PieceSet | None],
        build: Callable[[], PieceSet],
        publish: Callable[[PieceSet], bool],
    ) -> PieceSet:
        """The pieces called ``name``; raises what ``find`` and ``build`` raise."""
        found = find()
        if found is not None:
            return found
        self._on_miss()

        def build_in_account() -> PieceSet:
            with self._account.phase("build"):
                return build()

        with self._account.phase("single flight") as phase:
            flight = single_flight(Work(name, find, build_in_account, publish), self._leases, self._policy)
            phase.note = flight.outcome if flight.reason is None else f"{flight.outcome}: {flight.reason}"
        logger.info("pieces %s: %s after waiting for %.1f s", name[:16], phase.note, flight.waited_s)
        return flight.value
