"""A coroutine that is started where it is called: done at once, or finished by a task."""

from __future__ import annotations

import asyncio

import pytest

from cluster.api.eager import start_eagerly


async def test_a_coroutine_that_never_waits_is_done_at_once() -> None:
    done = []

    async def work() -> None:
        done.append(1)

    assert start_eagerly(work()) is None
    assert done == [1]


async def test_what_waits_is_finished_by_a_task() -> None:
    event, log = asyncio.Event(), []

    async def work() -> None:
        log.append("begun")
        await event.wait()
        await asyncio.sleep(0)
        log.append("ended")

    task = start_eagerly(work())
    assert task is not None
    assert log == ["begun"]
    event.set()
    await task
    assert log == ["begun", "ended"]


async def test_errors_come_where_they_happen() -> None:
    async def work(waits: bool) -> None:
        if waits:
            await asyncio.sleep(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start_eagerly(work(waits=False))
    task = start_eagerly(work(waits=True))
    assert task is not None
    with pytest.raises(ZeroDivisionError):
        await task


async def test_a_cancellation_reaches_the_coroutine_which_may_still_wait() -> None:
    log = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            log.append("cleaned up")

    task = start_eagerly(work())
    assert task is not None
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["cleaned up"]
