"""Processes that die or stop under real streams: the clients see what an undisturbed engine gives."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from tests.cluster.chaos import Case, Received, kill_replicas, make_cases, stream_during
from tests.cluster.conftest import MODEL, Deployment
from workers import LLM

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cases(deployment: Deployment) -> list[Case]:
    """Requests, and the answers of an engine that nobody disturbs."""
    return make_cases(LLM(str(deployment.folder), dtype="float32", device="cpu", max_num_seqs=16), 20)


def assert_all_is_well(deployment: Deployment, results: list[tuple[Case, Received]]) -> None:
    for case, received in results:
        assert received.verdict(case.expected) == "ok", (case, received)
    deployment.wait_for("ok", timeout_s=90)
    deadline = time.monotonic() + 10
    while deployment.metric("warmgraph_kv_blocks_free") != deployment.metric("warmgraph_kv_blocks"):
        assert time.monotonic() < deadline, "blocks are still held"
        time.sleep(0.1)


async def test_a_killed_replicas_streams_go_on_as_if_nothing_had_happened(
    deployment: Deployment, cases: list[Case]
) -> None:
    deployment.wait_for("ok")
    results, num_killed = await stream_during(
        deployment.url, MODEL, cases, 60, lambda: kill_replicas(deployment.process.pid, 2, 3.0, part=f":engine-{MODEL}")
    )
    assert num_killed == 2
    assert len(results) > 60, "the streams were not there when the replicas died"
    assert_all_is_well(deployment, results)


async def test_a_stopped_replicas_streams_go_on_elsewhere_and_it_is_replaced(
    deployment: Deployment, cases: list[Case]
) -> None:
    deployment.wait_for("ok")
    victim = deployment.engine_pids()[0]

    async def stop() -> None:
        await asyncio.sleep(0.5)
        os.kill(victim, signal.SIGSTOP)
        await asyncio.sleep(1.0)

    results, _ = await stream_during(deployment.url, MODEL, cases, 20, stop)
    assert max(received.longest_pause_s for _, received in results) > 1.0, "no stream was on the stopped replica"
    async with asyncio.timeout(90):
        while victim in deployment.engine_pids():
            await asyncio.sleep(0.5)
    assert_all_is_well(deployment, results)


async def test_an_ingress_that_dies_leaves_no_request_behind_and_is_replaced(
    deployment: Deployment, cases: list[Case]
) -> None:
    deployment.wait_for("ok")

    async def kill_ingress() -> None:
        await asyncio.sleep(0.5)
        (pid,) = deployment.pids(":ingress")
        os.kill(pid, signal.SIGKILL)

    results, _ = await stream_during(deployment.url, MODEL, cases, 20, kill_ingress)
    verdicts = {received.verdict(case.expected) for case, received in results}
    assert verdicts <= {"ok", "failed"}, "a client took a stream for complete that was cut off"
    assert "failed" in verdicts
    assert_all_is_well(deployment, [])
    results, _ = await stream_during(deployment.url, MODEL, cases, 5, lambda: asyncio.sleep(0.1))
    assert_all_is_well(deployment, results)
