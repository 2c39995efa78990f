"""Sends a workload at a rate or at a fixed concurrency, and tells whoever watches. Knows no terminal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import aiohttp

from cluster.bench.client import Target, Timing, send
from cluster.bench.workload import PlannedRequest

#: Called after every request with the requests sent so far, those that ended, and the result of the last.
Watcher = Callable[[int, int, Timing], None]


async def run_load(
    target: Target,
    requests: Iterable[PlannedRequest],
    concurrency: int | None,
    timeout_s: float,
    watch: Watcher = lambda sent, ended, last: None,
) -> tuple[list[Timing], float]:
    """Send every request, wait for all of them.

    Args:
        target: The server.
        requests: In order; each waits for its ``gap_s`` first.
        concurrency: Most requests in flight; None for no bound, as arrivals of a rate have none.
        timeout_s: Longest time for one request.
        watch: Hears of every result.

    Returns:
        The results, in the order of the requests, and the seconds that it all took.
    """
    slots = asyncio.Semaphore(concurrency) if concurrency else None
    results: list[asyncio.Task[Timing]] = []
    num_ended = 0

    async def one(session: aiohttp.ClientSession, request: PlannedRequest) -> Timing:
        nonlocal num_ended
        timing = await send(session, target, request)
        if slots is not None:
            slots.release()
        num_ended += 1
        watch(len(results), num_ended, timing)
        return timing

    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        started = due = time.perf_counter()
        for request in requests:
            due += request.gap_s
            if slots is not None:
                await slots.acquire()
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            results.append(asyncio.get_running_loop().create_task(one(session, request)))
        timings = await asyncio.gather(*results)
        return timings, time.perf_counter() - started
