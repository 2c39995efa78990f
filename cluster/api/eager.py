"""Starting a coroutine where it is called, with a task only if it has to wait.

Sending a chunk nearly never waits, and a task for it would cost as much as the sending. Python 3.12 has eager tasks;
this is the part of them that is needed, for 3.11 too. Knows nothing about what the coroutine does.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any


def start_eagerly(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
    """Run a coroutine until it waits for the first time; None if it did not, else the task that does the rest.

    Until then ``asyncio.current_task()`` is the caller's, so the coroutine must not rely on it, as
    ``asyncio.timeout`` does.

    Raises:
        BaseException: What the coroutine raised before it waited.
    """
    try:
        waited_for = coroutine.send(None)
    except StopIteration:
        return None
    return asyncio.get_running_loop().create_task(_finish(coroutine, waited_for))


async def _finish(coroutine: Coroutine[Any, Any, None], waited_for: Any) -> None:
    await _go_on(coroutine, waited_for)


@types.coroutine
def _go_on(coroutine: Coroutine[Any, Any, None], waited_for: Any) -> Generator[Any, Any, None]:
    """What ``await coroutine`` does, from where it waits for ``waited_for``."""
    while True:
        try:
            try:
                value = yield waited_for
            except BaseException as error:  # noqa: BLE001  # a cancellation is the coroutine's to handle
                waited_for = coroutine.throw(error)
            else:
                waited_for = coroutine.send(value)
        except StopIteration:
            return
