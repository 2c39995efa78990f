"""The replica around an engine that computes nothing, without Ray: connections, heartbeats, deaths, hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stub_engine import NUM_BLOCKS, StubEngine, StubReplica, stub_token, write_stub_model
from cluster.messages import GenerateRequest, StepMessage, SubmitReply
from cluster.serving.step_socket import read_messages
from workers.errors import EngineDeadError
from workers.outputs import TokenChunk
from workers.sampling_params import SamplingParams
from workers.startup.account import StartupAccount

HEARTBEAT_S = 0.05
STEP_TIMEOUT_S = 0.3


HERE = "this node"


class Replica(StubReplica):
    """A replica whose engine can be made to hang."""

    def _node_id(self) -> str:
        return HERE

    def _make_engine(self, account: StartupAccount) -> Any:
        self.may_step = threading.Event()
        self.may_step.set()

        class Engine(StubEngine):
            def step(engine) -> list[TokenChunk]:
                self.may_step.wait()
                return super().step()

        return Engine(0.001)


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    replica = Replica({"model": str(write_stub_model(tmp_path)), "device": "cpu"}, 10, STEP_TIMEOUT_S, HEARTBEAT_S)
    yield replica
    replica.may_step.set()
    replica.__del__()
    await asyncio.sleep(0)


def make_request(name: str, max_tokens: int = 20, attempt: int = 0) -> GenerateRequest:
    return GenerateRequest(name, [1, 2, 3], SamplingParams(max_tokens=max_tokens), attempt=attempt)


async def submit(replica: Replica, client_id: str, request: GenerateRequest) -> SubmitReply:
    (reply,) = await replica.submit(client_id, [request])
    return reply


async def read(steps: AsyncIterator[StepMessage], request_id: str) -> list[int]:
    token_ids: list[int] = []
    async for message in steps:
        for chunk in message.chunks:
            if chunk.request_id == request_id:
                token_ids += chunk.token_ids
                if chunk.finish_reason is not None:
                    return token_ids
    raise AssertionError("the step stream ended")


async def test_tokens_come_on_the_connection_that_asked_for_them(replica: Replica) -> None:
    first, second = replica.steps("one", ""), replica.steps("two", "")
    await anext(first), await anext(second)
    assert (await submit(replica, "one", make_request("a"))).accepted
    assert (await submit(replica, "two", make_request("b"))).accepted
    expected = [stub_token([1, 2, 3], position) for position in range(20)]
    assert await read(first, "a") == expected
    assert await read(second, "b") == expected
    await first.aclose()  # type: ignore[attr-defined]  # a generator
    await second.aclose()  # type: ignore[attr-defined]


async def test_a_replica_on_the_same_node_sends_through_a_socket(replica: Replica) -> None:
    client_id = "c" * 32
    steps = replica.steps(client_id, HERE)
    path = await anext(steps)
    assert isinstance(path, str)
    assert Path(path).parent.stat().st_mode & 0o077 == 0
    messages = read_messages(path, client_id)
    await anext(messages)
    assert (await submit(replica, client_id, make_request("a"))).accepted
    assert await read(messages, "a") == [stub_token([1, 2, 3], position) for position in range(20)]
    await submit(replica, client_id, make_request("b", max_tokens=1_000_000))
    await steps.aclose()  # type: ignore[attr-defined]  # a generator
    async with asyncio.timeout(5):
        async for _ in messages:  # until the socket closes
            pass
        while (await replica.stats()).scheduler.num_free_blocks != NUM_BLOCKS:
            await asyncio.sleep(0.01)


async def test_a_socket_sends_nothing_to_a_connection_that_is_not_open(replica: Replica) -> None:
    steps = replica.steps("c" * 32, HERE)
    path = await anext(steps)
    assert isinstance(path, str)
    async with asyncio.timeout(5):
        assert [message async for message in read_messages(path, "d" * 32)] == []
    await steps.aclose()  # type: ignore[attr-defined]  # a generator


async def test_a_submission_without_a_connection_is_not_taken(replica: Replica) -> None:
    assert not (await submit(replica, "nobody", make_request("a"))).accepted
    assert (await replica.stats()).scheduler.num_running == 0


async def test_a_connection_that_closes_takes_its_requests_with_it_and_a_newer_one_stays(replica: Replica) -> None:
    first, second = replica.steps("one", ""), replica.steps("two", "")
    await anext(first), await anext(second)
    await submit(replica, "one", make_request("a", max_tokens=1_000_000))
    await submit(replica, "two", make_request("b", max_tokens=200))
    await first.aclose()  # type: ignore[attr-defined]  # a generator
    assert len(await read(second, "b")) == 200
    async with asyncio.timeout(5):
        while (await replica.stats()).scheduler.num_free_blocks != NUM_BLOCKS:
            await asyncio.sleep(0.01)
    await second.aclose()  # type: ignore[attr-defined]


async def test_an_idle_replica_says_that_it_lives(replica: Replica) -> None:
    steps = replica.steps("one", "")
    await anext(steps)
    async with asyncio.timeout(20 * HEARTBEAT_S):
        assert [(await anext(steps)).chunks for _ in range(3)] == [[], [], []]
    await steps.aclose()  # type: ignore[attr-defined]


async def test_an_engine_that_hangs_ends_its_streams_and_fails_the_health_check(replica: Replica) -> None:
    steps = replica.steps("one", "")
    await anext(steps)
    replica.check_health()
    replica.may_step.clear()
    await submit(replica, "one", make_request("a"))
    with pytest.raises(EngineDeadError, match="hangs: one step has taken more than"):
        async with asyncio.timeout(20 * STEP_TIMEOUT_S):
            await read(steps, "a")
    with pytest.raises(EngineDeadError, match="hangs"):
        replica.check_health()
    replica.may_step.set()  # it was only slow
    async with asyncio.timeout(5):
        while replica._thread.busy_s > STEP_TIMEOUT_S:
            await asyncio.sleep(0.01)
    replica.check_health()
