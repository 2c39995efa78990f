"""What an engine learns about its batches, and where that outlives the process.

A store is two calls, :meth:`HistogramStore.load` and :meth:`HistogramStore.save`; a file is one of them. When there is
time to save is the engine loop's part.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from workers.graphs.histogram import MAX_JSON_BYTES, BatchHistogram, HistogramError

logger = logging.getLogger(__name__)

#: Shortest pause between two saves, in seconds; what a process that is killed has learned since is lost.
SAVE_PERIOD_S = 5.0


class HistogramStore(Protocol):
    """Keeps the batches that all replicas have seen."""

    def load(self) -> BatchHistogram:
        """Everything that was saved, by whichever replica; empty if nothing was. The caller may change it.

        Raises:
            OSError, HistogramError: It cannot be read; the caller starts with nothing.
        """

    def save(self, new: BatchHistogram) -> None:
        """Add the batches that one replica has seen since its last save.

        Raises:
            OSError, HistogramError: Nothing was added; the caller tries again later.
        """


class FileHistogramStore:
    """One file, shared by the replicas of a host: each adds to it under a lock.

    A file that cannot be understood is replaced: it is a cache of what traffic will teach again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> BatchHistogram:
        """The file's histogram."""
        try:
            with self._path.open("rb") as file:
                return BatchHistogram.from_json(file.read(MAX_JSON_BYTES + 1))
        except FileNotFoundError:
            return BatchHistogram()
        except HistogramError as error:
            logger.warning("%s is ignored and will be replaced: %s", self._path, error)
            return BatchHistogram()

    def save(self, new: BatchHistogram) -> None:
        """Merge into the file: read, add, write beside it, move into place."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock():
            merged = self.load()
            merged.merge(new)
            handle, scratch = tempfile.mkstemp(dir=self._path.parent, prefix=".new-")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(merged.to_json())
                Path(scratch).replace(self._path)
            except BaseException:
                Path(scratch).unlink(missing_ok=True)
                raise

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        # The lock has a file of its own, since the histogram's is replaced; it ends with the process that holds it.
        handle = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


class Traffic:
    """The batches of one engine: what was learned before it started, and what it adds.

    Args:
        store: None keeps what is learned in this process.

    Attributes:
        histogram: Everything known: saved earlier, by all replicas, and recorded here.
        num_learned: Batches that were known at the start.
    """

    def __init__(self, store: HistogramStore | None = None) -> None:
        self._store = store
        self.histogram = self._load()
        self.num_learned = self.histogram.num_batches
        self._unsaved = BatchHistogram()
        self._saved_at = time.monotonic()

    def record(self, num_reqs: int, num_tokens: int, *, is_decode: bool) -> None:
        """Count one batch of at least one token."""
        self.histogram.record(num_reqs, num_tokens, is_decode=is_decode)
        if self._store is not None:
            self._unsaved.record(num_reqs, num_tokens, is_decode=is_decode)

    def save_if_due(self) -> None:
        """Save what is new, unless that was done a moment ago; called whenever the engine can spare a moment."""
        if time.monotonic() - self._saved_at >= SAVE_PERIOD_S:
            self.save()

    def save(self) -> None:
        """Save what is new; a store that fails costs what was learned, never the engine."""
        self._saved_at = time.monotonic()
        if self._store is None or self._unsaved.num_batches == 0:
            return
        try:
            self._store.save(self._unsaved)
        except (OSError, HistogramError) as error:
            logger.warning("the batch histogram was not saved: %s", error)
            return
        self._unsaved = BatchHistogram()

    def _load(self) -> BatchHistogram:
        if self._store is None:
            return BatchHistogram()
        try:
            return self._store.load()
        except (OSError, HistogramError) as error:
            logger.warning("the batch histogram cannot be read, so capture sizes are not learned from it: %s", error)
            return BatchHistogram()
