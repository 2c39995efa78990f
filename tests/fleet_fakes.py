"""Replicas without Ray or engine, behind what a fleet uses of a Serve handle; they can be killed, stopped and hung."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.exceptions import RayActorError

from cluster.config import ReplicaConfig
from cluster.messages import GenerateRequest, ReplicaState, StepMessage, SubmitReply
from cluster.routing import running_replicas
from cluster.routing.prefix_index import PrefixFeed, PrefixIndex
from cluster.serving.fleet import Fleet
from cluster.serving.outbox import Outbox
from cluster.serving.refusals import Refusals
from tests.replica_states import replica_state
from workers.outputs import FinishReason, TokenChunk

STEP_S = 0.001
HEARTBEAT_TIMEOUT_S = 0.2


def token_at(request: GenerateRequest, position: int) -> int:
    """The token that every replica draws for a request at an output position."""
    seed = 0 if request.params.is_greedy else request.params.seed
    return random.Random(f"{seed} {request.prompt_token_ids} {position}").randrange(1000)


def expected_tokens(request: GenerateRequest) -> list[int]:
    """What an undisturbed replica answers."""
    assert request.params.max_tokens is not None
    return [token_at(request, position) for position in range(request.params.max_tokens)]


class FakeReplica:
    """Steps all its requests, one token each, until it dies.

    Attributes:
        max_queued: Requests that it takes at most.
        max_num_seqs: What it reports.
        most_running: Most requests that it had at once.
        num_submissions: Calls in which it was sent requests.
        poison: Requests of which it dies when a step includes them.
        received: Every request it was sent.
        aborted: Ids of requests that were aborted.
    """

    def __init__(self, replica_id: str, poison: Callable[[GenerateRequest, int], bool]) -> None:
        self.replica_id = replica_id
        self.max_queued = 1000
        self.max_num_seqs = 100
        self.most_running = 0
        self.num_submissions = 0
        self.poison = poison
        self.received: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.is_dead = self.is_stopped = False
        self.num_steps = 0
        self.running: dict[str, tuple[GenerateRequest, str, int]] = {}
        self._outboxes: dict[str, Outbox] = {}
        self._stepping = asyncio.get_running_loop().create_task(self._step_for_ever())

    def state(self) -> ReplicaState:
        num_running = len(self.running)
        return replica_state(
            num_running=num_running, outstanding_tokens=num_running, max_num_seqs=self.max_num_seqs, step=self.num_steps
        )

    def die(self) -> None:
        self.is_dead, self.is_stopped = True, False
        self._stepping.cancel()
        for outbox in self._outboxes.values():
            outbox.wake()

    async def submit(self, client_id: str, requests: list[GenerateRequest]) -> list[SubmitReply]:
        await self._be_alive()
        self.num_submissions += 1
        return [self._submit(client_id, request) for request in requests]

    def _submit(self, client_id: str, request: GenerateRequest) -> SubmitReply:
        self.received.append(request)
        if client_id not in self._outboxes:
            return SubmitReply(False)
        if len(self.running) >= self.max_queued and not request.attempt:
            return SubmitReply(False, retry_after_s=2.0)
        self.running[request.request_id] = (request, client_id, len(request.resume_token_ids))
        self.most_running = max(self.most_running, len(self.running))
        return SubmitReply(True)

    async def stats(self) -> str:
        await self._be_alive()
        return f"figures of {self.replica_id}"

    async def abort(self, request_ids: list[str]) -> None:
        await self._be_alive()
        self.aborted += request_ids
        for request_id in request_ids:
            self.running.pop(request_id, None)

    async def steps(self, client_id: str, node_id: str) -> AsyncIterator[StepMessage]:
        await self._be_alive()
        outbox = self._outboxes[client_id] = Outbox(self.state(), PrefixFeed(PrefixIndex()))
        try:
            while True:
                message = await outbox.get()
                await self._be_alive()
                yield message
        finally:
            del self._outboxes[client_id]
            await self.abort([i for i, (_, owner, _) in self.running.items() if owner == client_id])

    async def _be_alive(self) -> None:
        while self.is_stopped and not self.is_dead:
            await asyncio.sleep(STEP_S)
        if self.is_dead:
            raise RayActorError

    async def _step_for_ever(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            if not self.is_stopped:
                self._step()

    def _step(self) -> None:
        self.num_steps += 1
        chunks: dict[str, list[TokenChunk]] = {client_id: [] for client_id in self._outboxes}
        for request_id, (request, client_id, position) in [*self.running.items()]:
            if self.poison(request, position):
                self.die()
                return
            chunk = TokenChunk(request_id, [token_at(request, position)], text=f"{position} ")
            if position == len(request.resume_token_ids):
                chunk.num_cached_tokens = 7
            self.running[request_id] = (request, client_id, position + 1)
            if position + 1 == request.params.max_tokens:
                chunk.finish_reason = FinishReason.LENGTH
                del self.running[request_id]
            chunks[client_id].append(chunk)
        for client_id, outbox in self._outboxes.items():
            outbox.put(chunks[client_id], self.state())


@dataclasses.dataclass
class FakeHandle:
    """Stands for the Serve handle of a deployment of fake replicas."""

    replicas: dict[str, FakeReplica] = dataclasses.field(default_factory=dict)
    app_name: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    deployment_name: str = "engine"
    is_initialized: bool = True

    def options(self, **_: bool) -> FakeHandle:
        return self

    @property
    def steps(self) -> Any:
        return _Method(lambda replica, *args: _Steps(replica.steps(*args)), self)

    @property
    def submit(self) -> Any:
        return _Method(lambda replica, *args: replica.submit(*args), self)

    @property
    def stats(self) -> Any:
        return _Method(lambda replica: replica.stats(), self)

    @property
    def abort(self) -> Any:
        return _Method(lambda replica, *args: replica.abort(*args), self)


@dataclasses.dataclass
class _Method:
    call: Callable[..., Any]
    handle: FakeHandle

    def remote(self, *args: Any, replica_id: str) -> Any:
        return self.call(self.handle.replicas[replica_id], *args)


class _Steps:
    def __init__(self, steps: Any) -> None:
        self._steps = steps

    def __aiter__(self) -> Any:
        return self._steps

    def cancel(self) -> None:
        """The replica notices later, when it is alive."""


class FakeCluster:
    """A fleet over fake replicas, and what Serve does to them."""

    def __init__(self, policy: Callable[..., str], refusals: Refusals | None = None, **replicas: Any) -> None:
        self.handle = FakeHandle()
        self.poison: Callable[[GenerateRequest, int], bool] = lambda request, position: False
        self.num_started = 0
        config = ReplicaConfig(**{"start_timeout_s": 2.0, "heartbeat_timeout_s": HEARTBEAT_TIMEOUT_S, **replicas})
        self.fleet = Fleet(self.handle, policy, config, refusals=refusals)  # type: ignore[arg-type]  # a fake
        self.fleet.start()

    @property
    def replicas(self) -> list[FakeReplica]:
        return [*self.handle.replicas.values()]

    async def start_replica(self) -> FakeReplica:
        """Serve starts a replica and lists it."""
        self.num_started += 1
        replica = FakeReplica(f"r{self.num_started}", lambda request, position: self.poison(request, position))
        self.handle.replicas[replica.replica_id] = replica
        self._announce()
        await until(lambda: replica.replica_id in {s.replica_id for s in self.fleet.snapshots} or replica.is_dead)
        return replica

    def remove(self, replica: FakeReplica) -> None:
        """Serve stops listing a replica."""
        self._announce(without=replica)

    async def replace(self, replica: FakeReplica) -> FakeReplica:
        """Serve notices that a replica is dead."""
        self.remove(replica)
        return await self.start_replica()

    def _announce(self, without: FakeReplica | None = None) -> None:
        ids = {i for i, r in self.handle.replicas.items() if r is not without and not r.is_dead}
        running_replicas.announce(self.handle.app_name, self.handle.deployment_name, frozenset(ids))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must happen soon."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(STEP_S)
