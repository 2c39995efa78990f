"""Something that a thread makes while the engine serves without it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from workers.startup.account import StartupAccount
from workers.startup.beside import beside

T = TypeVar("T")


class Incoming(Generic[T]):
    """Begins to make it at once.

    Args:
        make: Gets something to call when it turns out that making it takes long.
        account: Where this is written down.
    """

    def __init__(self, make: Callable[[Callable[[], None]], T], account: StartupAccount) -> None:
        self._is_decided = threading.Event()
        self._future = beside(account, "compiled model", lambda: make(self._is_decided.set))
        self._future.add_done_callback(lambda _: self._is_decided.set())

    def wait_for_hit(self) -> bool:
        """Wait until it is there (True), or until it is known to take long (False)."""
        self._is_decided.wait()
        return self.is_done

    @property
    def is_done(self) -> bool:
        """Whether :meth:`result` returns, or raises, at once."""
        return self._future.done()

    def result(self) -> T:
        """It; raises what making it raised."""
        return self._future.result()
