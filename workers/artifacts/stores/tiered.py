"""A node's own disk in front of a remote store: everything is read once per node.

Objects under the prefixes that are copied never change, so a local copy is as good as the remote one; what exists is
always asked of the remote store. If that one cannot be reached, the local copies answer for it, and a node that was
warm stays warm.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator

from workers.artifacts.errors import RefusedError, StoreError
from workers.artifacts.stores.base import ArtifactStore, StoredObject
from workers.artifacts.stores.directory import DirectoryStore

logger = logging.getLogger(__name__)

#: Lock files; objects share them by a hash of their names.
_NUM_LOCKS = 64


class TieredStore:
    """See :class:`workers.artifacts.stores.base.ArtifactStore`.

    Args:
        local: On this node's disk; safe to remove at any time.
        remote: Shared.
        copied: Prefixes of the names of which copies are kept; everything else is the remote store's alone.
        is_intact: Whether these bytes can be the object of this name; a local copy that cannot is fetched again.
        max_local_bytes: The copies used last are kept.
        lock_timeout_s: How long to wait for another process that fetches the same object.
    """

    def __init__(
        self,
        local: DirectoryStore,
        remote: ArtifactStore,
        copied: tuple[str, ...],
        is_intact: Callable[[str, bytes], bool],
        *,
        max_local_bytes: int = 8 << 30,
        lock_timeout_s: float = 30.0,
    ) -> None:
        self.url = f"{remote.url} (in front of it {local.url})"
        self._local = local
        self._remote = remote
        self._copied = copied
        self._is_intact = is_intact
        self._max_local_bytes = max_local_bytes
        self._lock_timeout_s = lock_timeout_s

    def get(self, name: str, max_bytes: int) -> bytes | None:
        """The local copy, or the remote object, of which a copy is kept."""
        if not name.startswith(self._copied):
            return self._remote.get(name, max_bytes)
        data = self._local_copy(name, max_bytes)
        if data is not None:
            return data
        with self._lock(name):
            data = self._local_copy(name, max_bytes)
            if data is not None:
                return data
            data = self._remote.get(name, max_bytes)
            if data is not None:
                self._keep(name, data)
            return data

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write to the remote store; a copy is kept even if that fails."""
        self._keep(name, data)
        return self._remote.put_if_absent(name, data)

    def list(self, prefix: str) -> list[StoredObject]:
        """What the remote store has, or, while it cannot be reached, what lies here."""
        try:
            return self._remote.list(prefix)
        except StoreError:
            found = self._local.list(prefix)
            if not found:
                raise
            return found

    def delete(self, name: str) -> None:
        """Remove both."""
        with contextlib.suppress(StoreError):
            self._local.delete(name)
        self._remote.delete(name)

    def _local_copy(self, name: str, max_bytes: int) -> bytes | None:
        try:
            data = self._local.get(name, max_bytes)
            if data is None:
                return None
            if self._is_intact(name, data):
                with contextlib.suppress(OSError):
                    os.utime(self._local.root / name)
                return data
            logger.warning("the local copy of %s is damaged and is fetched again", name)
            self._local.delete(name)
        except (StoreError, RefusedError) as error:
            logger.warning("the local copy of %s is not readable: %s", name, error)
        return None

    def _keep(self, name: str, data: bytes) -> None:
        try:
            if name.startswith(self._copied) and self._is_intact(name, data) and self._local.put_if_absent(name, data):
                self._trim()
        except StoreError as error:
            logger.warning("no local copy of %s: %s", name, error)

    def _trim(self) -> None:
        """Remove the copies that were not used for the longest time."""
        objects = self._local.list("")
        excess = sum(item.num_bytes for item in objects) - self._max_local_bytes
        for item in sorted(objects, key=lambda item: item.modified_s):
            if excess <= 0:
                return
            self._local.delete(item.name)
            excess -= item.num_bytes

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """One process of this node at a time. A lock ends with its holder; a holder that hangs is not waited for."""
        index = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big") % _NUM_LOCKS
        folder = self._local.root / ".locks"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(folder / f"{index:02}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            yield
            return
        try:
            deadline_s = time.monotonic() + self._lock_timeout_s
            while not _try_lock(handle) and time.monotonic() < deadline_s:
                time.sleep(0.02)
            yield
        finally:
            os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True
