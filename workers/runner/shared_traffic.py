"""Batch sizes shared by hosts: each host's own file, and what the others published beside the compiled pieces.

A host's total is one entry of the bundle, under a name that the host gave itself once; publishing again replaces it, so
nothing is counted twice. Knows histograms and the library; when there is a moment to save is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from pathlib import Path

from workers.artifacts.errors import ArtifactError
from workers.artifacts.key import BundleKey
from workers.artifacts.library import Addition, ArtifactLibrary
from workers.artifacts.manifest import Kind
from workers.graphs import BatchHistogram, HistogramError
from workers.graphs.traffic import HistogramStore

logger = logging.getLogger(__name__)

#: Shortest pause between two publications by one process, in seconds; its first save publishes what the host knows.
PUBLISH_PERIOD_S = 600.0


class SharedHistogramStore:
    """A host's store, read together with the other hosts' totals.

    Args:
        own: The host's.
        host: Its name among the contributors.
    """

    def __init__(self, own: HistogramStore, host: str, library: ArtifactLibrary, key: BundleKey) -> None:
        self._own = own
        self._host = host
        self._library = library
        self._key = key
        self._published_at: float | None = None
        self._publishing: threading.Thread | None = None

    def load(self) -> BatchHistogram:
        """Every host's batches; see :class:`HistogramStore`."""
        merged = self._own.load()
        bundle = self._library.peek(self._key)
        for entry in bundle.find(Kind.HISTOGRAM) if bundle is not None else ():
            if entry.name == self._host:
                continue
            assert bundle is not None
            try:
                merged.merge(BatchHistogram.from_json(self._library.read(bundle, entry)))
            except (ArtifactError, HistogramError) as error:
                logger.warning("the batch sizes of another host are left out: %s", error)
        return merged

    def save(self, new: BatchHistogram) -> None:
        """Add to the host's, and now and then have its total published, without waiting for that."""
        self._own.save(new)
        now = time.monotonic()
        is_due = self._published_at is None or now - self._published_at >= PUBLISH_PERIOD_S
        if is_due and (self._publishing is None or not self._publishing.is_alive()):
            thread = threading.Thread(target=self._publish, name="publish batch sizes", daemon=True)
            with contextlib.suppress(RuntimeError):  # as Python ends no thread starts: a longer process publishes
                thread.start()
                self._published_at, self._publishing = now, thread

    def wait(self) -> None:
        """Until what is being published is there."""
        if self._publishing is not None:
            self._publishing.join()

    def _publish(self) -> None:
        try:
            bundle = self._library.peek(self._key)
            if bundle is not None:  # without pieces there is nothing to be beside
                total = self._own.load().to_json().encode()
                self._library.publish(self._key, [Addition(Kind.HISTOGRAM, self._host, total)], bundle)
        except (OSError, ArtifactError, HistogramError) as error:
            logger.warning("batch sizes were not published: %s", error)


def host_name(folder: Path) -> str:
    """The name under which this host contributes, made at first use and kept in ``folder``."""
    path = folder / "host"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with path.open("x") as file:
            file.write(uuid.uuid4().hex)
    except FileExistsError:
        pass
    name = path.read_text()
    return name if name.isalnum() and len(name) == 32 else uuid.uuid4().hex
