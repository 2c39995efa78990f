"""The replicas of one model as an ingress sees them.

Keeps a link to every replica, spreads requests over them by a policy, and hands out every request's chunks in order,
whatever becomes of the replicas that produce them. Knows links and policies; knows nothing about HTTP or text.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.api.client import ChunkSink
from cluster.config import ReplicaConfig
from cluster.messages import DeploymentState, GenerateRequest, ReplicaStatus
from cluster.routing import running_replicas
from cluster.routing.policies import RoutingPolicy
from cluster.routing.snapshot import ReplicaSnapshot, RoutingRequest
from cluster.serving.failover import ReplicaLostError, ResumableRequest
from cluster.serving.gate import Gate
from cluster.serving.link import SILENT_TICKS, ReplicaLink, call_any_replica
from cluster.serving.refusals import Refusals
from cluster.serving.serve_state import deployment_state
from cluster.serving.suspects import Suspects, Turn
from cluster.serving.token_stream import TokenStream
from workers.errors import EngineDeadError, InvalidRequestError, QueueFullError
from workers.outputs import FinishReason, TokenChunk
from workers.scheduler.block_hash import hash_blocks
from workers.scheduler.prefix_journal import names_of

#: Pause before replicas that gave no answer are asked again, in seconds.
_RETRY_S = 0.1
#: Longest wait for a replica's figures, in seconds: one that has just died must not spoil a scrape of all, for which
#: Prometheus waits 10 s.
_ASK_TIMEOUT_S = 5.0
#: How often an ingress asks what others refused, in seconds.
_REFUSALS_INTERVAL_S = 1.0
#: Pace at which replicas are told the load, in seconds, and how long a report waits for requests that come together.
_REPORT_INTERVAL_S, _GATHER_S = 0.5, 0.1


class Fleet:
    """One model's replicas, seen from one ingress.

    Args:
        handle: Handle of the model's deployment, which must use ``PinnedRouter``.
        policy: Picks a replica for each request.
        replicas: Limits and time-outs.
        prefix_block_size: Tokens per KV block if the policy is to know cached prefixes, else None.
        node_id: Ray's id of this process' node.
        refusals: What all ingresses know of requests that kill replicas; None if there is no other.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        policy: RoutingPolicy,
        replicas: ReplicaConfig,
        prefix_block_size: int | None = None,
        node_id: str = "",
        refusals: Refusals | None = None,
    ) -> None:
        self._handle = handle
        self._policy = policy
        self._start_timeout_s = replicas.start_timeout_s
        self._prefix_block_size = prefix_block_size
        self._node_id = node_id
        self._tick_s = replicas.heartbeat_timeout_s / SILENT_TICKS
        self._gate = Gate(lambda: self.snapshots, replicas, self._wake)
        self._autoscaling = replicas.autoscaling
        self._ingress_id = uuid.uuid4().hex
        self._waking: asyncio.Task[None] | None = None
        self._links: dict[str, ReplicaLink] = {}
        self._refusals = refusals
        self._suspects = Suspects(self._publish_refusal)
        self._connected = asyncio.Event()
        self._sequence = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Connect to the replicas there are, and to every one that comes; call on the event loop."""
        loop = asyncio.get_running_loop()
        if not self._handle.is_initialized:
            self._handle._init()  # type: ignore[no-untyped-call]  # Ray's own gap

        def on_replicas(replica_ids: frozenset[str]) -> None:
            loop.call_soon_threadsafe(self._on_replicas, replica_ids)

        running_replicas.listen(self._handle.app_name, self._handle.deployment_name, on_replicas)
        self._begin(self._tick())
        if self._autoscaling is not None:
            self._begin(self._report_load())
        if self._refusals is not None:
            self._begin(self._follow_refusals(self._refusals))

    @property
    def snapshots(self) -> list[ReplicaSnapshot]:
        """The replicas that take requests."""
        return [link.snapshot() for link in self._links.values() if link.is_routable]

    @property
    def num_held(self) -> int:
        """Requests that wait here for a place at a replica."""
        return self._gate.num_waiting

    async def generate(self, request: GenerateRequest, on_chunks: ChunkSink) -> None:
        """Run a request on a replica of the policy's choice; ``on_chunks`` gets its chunks. Cancelling aborts it.

        If the replica is lost the request goes on elsewhere, from the last token that was handed out.

        Raises:
            QueueFullError: Every replica's queue is full.
            InvalidRequestError: The engine refused the request.
            PoisonedRequestError: Replicas keep dying of the request.
            EngineDeadError: No replica became ready in time.
        """
        resumable = ResumableRequest(request)
        while not resumable.is_finished:
            async with self._suspects.turn(resumable) as turn:
                try:
                    await self._attempt(resumable, turn, on_chunks)
                except ReplicaLostError as lost:
                    self._suspects.note_death(resumable, lost.death)
        self._gate.finish(request, resumable.num_tokens)

    async def _attempt(self, resumable: ResumableRequest, turn: Turn, on_chunks: ChunkSink) -> None:
        """Run a request on one replica, to its end if the replica lives to see it."""
        attempt = resumable.next_attempt()
        link, stream = await self._submit(attempt, is_alone=turn.is_alone)

        def receive(chunks: Sequence[TokenChunk]) -> None:
            lost = chunks[-1] if chunks[-1].finish_reason is FinishReason.ERROR else None
            if lost is not None:
                chunks = chunks[:-1]
            for chunk in chunks:
                resumable.accept(chunk)
            if self._suspects.has_any and self._suspects.is_cleared(resumable):
                turn.end()
            if chunks:
                on_chunks(chunks)
            if lost is not None:
                raise ReplicaLostError(lost.error or "The engine stopped.", link.connection_id)

        try:
            await stream.read(receive)
        finally:
            link.release(attempt.request_id, abort=not resumable.is_finished)

    async def stats(self) -> dict[str, Any]:
        """Every connected replica's ``EngineStats``, by replica id; replicas that do not answer are left out."""
        return await self._ask_all("stats")

    async def status(self) -> dict[str, ReplicaStatus]:
        """Every connected replica's account of itself, by replica id; replicas that do not answer are left out."""
        return await self._ask_all("status")

    async def deployment_state(self) -> DeploymentState | None:
        """What Serve says of the replicas, those that do not start included."""
        return await deployment_state(self._handle.app_name, self._handle.deployment_name)

    async def _ask_all(self, method: str) -> dict[str, Any]:
        links = [link for link in self._links.values() if link.is_routable]
        answers = await asyncio.gather(*(_ask(link, method) for link in links))
        return {link.replica_id: answer for link, answer in zip(links, answers, strict=True) if answer is not None}

    async def _submit(self, request: GenerateRequest, *, is_alone: bool) -> tuple[ReplicaLink, TokenStream]:
        """Wait for a place and find a replica that takes it. Others wait for one that ``is_alone``: it goes at once."""
        try:
            if not request.attempt:
                await self._gate.enter(request)
            elif not is_alone:
                await self._gate.enter_again(request)
            async with asyncio.timeout(self._start_timeout_s):
                while True:
                    await self._connected.wait()
                    taken = await self._offer(request)
                    if taken is not None:
                        return taken
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            raise EngineDeadError(
                f"No replica was ready to take the request within {self._start_timeout_s:.0f} s; try again later."
            ) from None
        finally:
            self._gate.passed(request.request_id)

    async def _offer(self, request: GenerateRequest) -> tuple[ReplicaLink, TokenStream] | None:
        """Offer the request to one replica after another, in the policy's order; None if none of them answers."""
        retry_after_s = 0.0
        refused: set[str] = set()
        while links := [link for link in self._links.values() if link.is_routable and link.replica_id not in refused]:
            link, cached_tokens = self._choose(request, links)
            self._gate.passed(request.request_id)
            stream, reply = await link.offer(request, cached_tokens)
            if reply.accepted:
                return link, stream
            if reply.error is not None:
                raise InvalidRequestError(reply.error, param=reply.param)
            refused.add(link.replica_id)
            retry_after_s = max(retry_after_s, reply.retry_after_s or 0.0)
        if retry_after_s:
            raise QueueFullError("Every replica's queue is full; try again later.", retry_after_s)
        return None

    def _choose(self, request: GenerateRequest, links: list[ReplicaLink]) -> tuple[ReplicaLink, int]:
        """Ask the policy; returns its choice and how much of the prompt is cached there."""
        tokens = [*request.prompt_token_ids, *request.resume_token_ids]
        block_size = self._prefix_block_size or 0
        names = names_of(hash_blocks(tokens, block_size)) if block_size else []
        snapshots = [link.snapshot(link.prefixes.longest_prefix(names) * block_size) for link in links]
        routing = RoutingRequest(len(tokens), self._sequence, request.params.max_tokens or 16)
        self._sequence += 1
        with_room = [snapshot for snapshot in snapshots if self._gate.has_room(snapshot)]
        chosen = self._policy(routing, with_room or snapshots)
        return self._links[chosen], next(s.cached_tokens for s in snapshots if s.replica_id == chosen)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """On a task that is kept until it ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Requests that kill replicas.

    def _publish_refusal(self, digest: bytes) -> None:
        if self._refusals is not None:
            self._begin(self._refusals.publish(digest))

    async def _follow_refusals(self, refusals: Refusals) -> None:
        """Learn what other ingresses refused, this one before a restart among them."""
        while True:
            refused = await refusals.read()
            if refused is not None:
                self._suspects.refused_elsewhere = refused
            await asyncio.sleep(_REFUSALS_INTERVAL_S)

    # Autoscaling.

    async def _report_load(self) -> None:
        """Tell every replica what waits and comes in here; they pass it on to Serve's controller.

        At a steady pace, and as soon as requests begin to wait. A replica that does not answer keeps nobody else
        waiting.
        """
        loop = asyncio.get_running_loop()
        telling: dict[ReplicaLink, asyncio.Task[Any]] = {}
        was_idle = True
        while True:
            await self._gate.wait_for_news(_REPORT_INTERVAL_S - _GATHER_S)
            await asyncio.sleep(_GATHER_S)
            load = self._gate.load()
            is_idle = not (load.num_held or load.has_arrivals or load.prompt_tokens_per_s or load.output_tokens_per_s)
            telling = {link: task for link, task in telling.items() if not task.done()}
            for link in self._links.values():
                if link.is_routable and link not in telling and not (is_idle and was_idle):
                    telling[link] = loop.create_task(link.ask("report_ingress", self._ingress_id, load))
            was_idle = is_idle

    def _wake(self) -> None:
        """A request waits and there is no replica: let Serve see a waiting call, for which it starts one."""
        if self._autoscaling is not None and (self._waking is None or self._waking.done()):
            self._waking = asyncio.get_running_loop().create_task(call_any_replica(self._handle, "stats"))

    # Replicas come and go.

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            for link in [*self._links.values()]:
                link.tick()

    def _on_replicas(self, replica_ids: frozenset[str]) -> None:
        for replica_id, link in [*self._links.items()]:
            if replica_id not in replica_ids and not link.is_draining:
                link.drain()
        for replica_id in replica_ids - self._links.keys():
            link = ReplicaLink(replica_id, self._handle, self._note_connected, self._gate.open, self._node_id)
            self._links[replica_id] = link
            self._begin(self._follow(link))
        self._note_connected()

    async def _follow(self, link: ReplicaLink) -> None:
        try:
            await link.follow()
        finally:
            del self._links[link.replica_id]

    def _note_connected(self) -> None:
        if any(link.is_routable for link in self._links.values()):
            self._connected.set()
        else:
            self._connected.clear()


async def _ask(link: ReplicaLink, method: str) -> Any:
    """What a replica answers soon, or None."""
    try:
        return await asyncio.wait_for(link.ask(method), _ASK_TIMEOUT_S)
    except TimeoutError:
        return None
