"""Work on a thread of its own while the start goes on, as a phase of the account."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from workers.startup.account import StartupAccount

T = TypeVar("T")


def beside(account: StartupAccount, name: str, work: Callable[[], T]) -> Future[T]:
    """Begin ``work``; its result, or what it raises, comes with the future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            with account.phase(name):
                result = work()
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name.replace(" ", "-"), daemon=True).start()
    return future
