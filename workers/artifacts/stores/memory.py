"""A store that ends with its process."""

from __future__ import annotations

import threading
import time

from workers.artifacts.errors import Refusal, RefusedError
from workers.artifacts.names import check_name
from workers.artifacts.stores.base import StoredObject


class MemoryStore:
    """See :class:`workers.artifacts.stores.base.ArtifactStore`."""

    def __init__(self) -> None:
        self.url = "memory:"
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()

    def get(self, name: str, max_bytes: int) -> bytes | None:
        """What was put, or None."""
        with self._lock:
            data, _ = self._objects.get(check_name(name), (None, 0.0))
        if data is not None and len(data) > max_bytes:
            raise RefusedError(Refusal.TOO_LARGE, f"{name} has {len(data)} bytes, more than {max_bytes}.")
        return data

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Keep it, unless there is one."""
        with self._lock:
            if check_name(name) in self._objects:
                return False
            self._objects[name] = (bytes(data), time.time())
            return True

    def list(self, prefix: str) -> list[StoredObject]:
        """By name."""
        with self._lock:
            found = [(name, *value) for name, value in self._objects.items() if name.startswith(prefix)]
        return [StoredObject(name, len(data), modified_s) for name, data, modified_s in sorted(found)]

    def delete(self, name: str) -> None:
        """Forget it."""
        with self._lock:
            self._objects.pop(check_name(name), None)
