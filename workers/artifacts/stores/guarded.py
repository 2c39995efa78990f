"""A store that can neither hang nor be asked in vain again and again.

Every call runs on a thread of its own and gets so many seconds: a mount whose server is gone blocks a thread in the
kernel, where no time-out of a library reaches it. After a failure the store is left alone for a while, reading and
writing each for themselves, since a store that is full or read-only can still be read. One warning per failure.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from workers.artifacts.errors import StoreError
from workers.artifacts.stores.base import ArtifactStore, StoredObject

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Direction = Literal["reading", "writing"]


class GuardedStore:
    """See :class:`workers.artifacts.stores.base.ArtifactStore`.

    Args:
        store: The store itself.
        timeout_s: Longest time of one call.
        rest_s: How long the store is left alone after a failure.
        on_failure: Told of each failure.
    """

    def __init__(
        self,
        store: ArtifactStore,
        timeout_s: float,
        *,
        rest_s: float = 60.0,
        on_failure: Callable[[Direction], None] | None = None,
    ) -> None:
        self.url = store.url
        self._store = store
        self._timeout_s = timeout_s
        self._rest_s = rest_s
        self._on_failure = on_failure
        self._resting: dict[Direction, tuple[float, str]] = {}

    def get(self, name: str, max_bytes: int) -> bytes | None:
        """See the store."""
        return self._call("reading", lambda: self._store.get(name, max_bytes))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See the store."""
        return self._call("writing", lambda: self._store.put_if_absent(name, data))

    def list(self, prefix: str) -> list[StoredObject]:
        """See the store."""
        return self._call("reading", lambda: self._store.list(prefix))

    def delete(self, name: str) -> None:
        """See the store."""
        self._call("writing", lambda: self._store.delete(name))

    def _call(self, direction: Direction, function: Callable[[], Result]) -> Result:
        until_s, reason = self._resting.get(direction, (0.0, ""))
        if time.monotonic() < until_s:
            raise StoreError(reason)
        try:
            return _within(function, self._timeout_s, self.url)
        except StoreError as error:
            self._resting[direction] = (time.monotonic() + self._rest_s, str(error))
            logger.warning("artifact store, %s: %s Not tried again for %.0f s.", direction, error, self._rest_s)
            if self._on_failure is not None:
                self._on_failure(direction)
            raise


def _within(function: Callable[[], Result], timeout_s: float, url: str) -> Result:
    """The function's result, if it comes in time; a thread that hangs does not keep the process from ending."""
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((function(), None))
        except BaseException as error:  # noqa: BLE001  # handed to the caller
            results.put((None, error))

    threading.Thread(target=run, name="artifact-store", daemon=True).start()
    try:
        result, error = results.get(timeout=timeout_s)
    except queue.Empty:
        raise StoreError(f"{url}: no answer within {timeout_s:g} s.") from None
    if error is not None:
        raise error
    answer: Result = result
    return answer
