"""Better piece formats, built beside a replica that serves already.

A replica starts from the format that is ready first. Once it has nothing else to do, the formats that load faster are
built by a child at the lowest priority, by one replica of the fleet, and published for the next start. Knows which
formats are missing; how one is built is :mod:`workers.compile.background`'s business.
"""

from __future__ import annotations

import functools
import logging
import threading

from workers.artifacts.errors import ArtifactError
from workers.artifacts.key import BundleKey
from workers.artifacts.library import ArtifactLibrary
from workers.compile.background import BackgroundBuild
from workers.compile.errors import BuildFailedError, CompileError
from workers.compile.piece_set import PieceSet, publish
from workers.compile.stored import StoredPieces
from workers.config import EngineConfig
from workers.leases.base import LeaseService
from workers.leases.single_flight import FlightPolicy, Work, single_flight

logger = logging.getLogger(__name__)

#: Longest wait for another replica that builds; then this one leaves it to the next start.
_DEADLINE_S = 1800.0


class BackgroundFormats:
    """Builds what is missing of ``config``'s formats, once, on a thread that only waits.

    Args:
        device_type: Where the engine runs: which formats there are.
        library: Where the running pieces lie, and what is built goes.
        key: Of their bundle.
        leases: Who builds.
    """

    def __init__(
        self, config: EngineConfig, device_type: str, library: ArtifactLibrary, key: BundleKey, leases: LeaseService
    ) -> None:
        compilation = config.compilation_config
        *self._better, self._running = compilation.piece_formats(device_type)
        self._sizes = compilation.all_sizes()
        self._library, self._key, self._leases = library, key, leases
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless that was done before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="background formats", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until everything is built, or was given up."""
        assert self._thread is not None
        self._thread.join()

    def _run(self) -> None:
        take = functools.partial(publish, self._library, self._key)
        for name in self._better:
            stored = StoredPieces(self._library, self._key, (name,), self._sizes)
            work = Work(f"{self._key.digest}-{name}", stored.find, functools.partial(self._build, name), take)
            try:
                if stored.find() is None:
                    flight = single_flight(work, self._leases, FlightPolicy(deadline_s=_DEADLINE_S))
                    logger.info("%s pieces for the next start: %s", name, flight.outcome)
            except (CompileError, ArtifactError, OSError) as error:
                logger.warning("%s pieces were not built in the background: %s", name, error)

    def _build(self, name: str) -> PieceSet:
        pieces = StoredPieces(self._library, self._key, (self._running,), self._sizes).find()
        if pieces is None:
            raise BuildFailedError("The pieces that this replica runs from are not in the store.")
        with self._library.building(self._key):
            return BackgroundBuild(pieces, name, sizes=self._sizes).wait()
