"""The replicas of one model as an ingress sees them.

Keeps one step stream per replica, spreads requests over the replicas by a policy, and gives every request its own
iterator of chunks. Knows Serve handles and messages; knows nothing about HTTP or text.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.messages import GenerateRequest, ReplicaState, ReplicaStatus, StepMessage, SubmitReply
from cluster.routing import running_replicas
from cluster.routing.policies import ReplicaSnapshot, RoutingPolicy, RoutingRequest
from workers.errors import EngineDeadError, InvalidRequestError, QueueFullError
from workers.outputs import FinishReason, TokenChunk

logger = logging.getLogger("ray.serve")

#: Longest wait for a replica's answer to a submission or an abort, in seconds.
_CALL_TIMEOUT_S = 30.0
#: Pause before connecting again to a replica that Serve still lists, in seconds.
_RECONNECT_S = 0.5


class _TokenStream:
    """The chunks of one request, waiting for their reader."""

    def __init__(self) -> None:
        self._chunks: list[TokenChunk] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, chunk: TokenChunk) -> None:
        self._chunks.append(chunk)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._changed.set()

    async def get(self) -> list[TokenChunk]:
        """All chunks that arrived since the last call; waits for at least one, raises what :meth:`fail` was given."""
        await self._changed.wait()
        self._changed.clear()
        if not self._chunks and self._error is not None:
            raise self._error
        chunks, self._chunks = self._chunks, []
        if self._error is not None:
            self._changed.set()
        return chunks


@dataclasses.dataclass(slots=True)
class _Link:
    """The connection to one replica.

    Attributes:
        state: Its last report; None until the first message: the replica takes no requests before.
        streams: The requests that run there on behalf of this ingress.
        unreported: Tokens of requests sent since the last report, by request.
        task: Reads the step stream.
        draining: Serve no longer lists the replica: what runs there finishes, nothing new goes there.
    """

    replica_id: str
    state: ReplicaState | None = None
    streams: dict[str, _TokenStream] = dataclasses.field(default_factory=dict)
    unreported: dict[str, int] = dataclasses.field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    draining: bool = False

    @property
    def is_routable(self) -> bool:
        return self.state is not None and not self.draining

    def snapshot(self) -> ReplicaSnapshot:
        assert self.state is not None
        return ReplicaSnapshot(self.replica_id, self.state, len(self.unreported), sum(self.unreported.values()))

    def fail(self, error: Exception) -> None:
        self.state = None
        self.unreported.clear()
        for stream in self.streams.values():
            stream.fail(error)
        self.streams.clear()

    def close_if_drained(self) -> None:
        """Let go of a replica that is being stopped, once its last request is done."""
        if self.draining and not self.streams and self.task is not None:
            self.task.cancel()


class Fleet:
    """One model's replicas, seen from one ingress.

    Args:
        handle: Handle of the model's deployment, which must use ``PinnedRouter``.
        app_name: The Serve application.
        deployment: The deployment's name.
        policy: Picks a replica for each request.
        start_timeout_s: Longest time a request waits while no replica is connected.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        app_name: str,
        deployment: str,
        policy: RoutingPolicy,
        start_timeout_s: float,
    ) -> None:
        self._handle = handle
        self._app_name = app_name
        self._deployment = deployment
        self._policy = policy
        self._start_timeout_s = start_timeout_s
        self._client_id = uuid.uuid4().hex
        self._links: dict[str, _Link] = {}
        self._connected = asyncio.Event()
        self._sequence = 0
        self._background: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Connect to the replicas there are, and to every one that comes; call on the event loop."""
        loop = asyncio.get_running_loop()
        if not self._handle.is_initialized:
            self._handle._init()  # type: ignore[no-untyped-call]  # Ray's own gap

        def on_replicas(replica_ids: frozenset[str]) -> None:
            loop.call_soon_threadsafe(self._on_replicas, replica_ids)

        running_replicas.listen(self._app_name, self._deployment, on_replicas)

    @property
    def snapshots(self) -> list[ReplicaSnapshot]:
        """The connected replicas."""
        return [link.snapshot() for link in self._links.values() if link.is_routable]

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Run a request on a replica of the policy's choice and yield its chunks; closing the iterator aborts it.

        Raises:
            QueueFullError: Every replica's queue is full.
            InvalidRequestError: The engine refused the request.
            EngineDeadError: The replica died, or none became ready in time.
        """
        link = await self._submit(request)
        stream = link.streams[request.request_id]
        finished = False
        try:
            while not finished:
                for chunk in await stream.get():
                    finished = chunk.finish_reason is not None
                    if chunk.finish_reason is FinishReason.ERROR:
                        raise EngineDeadError(chunk.error or "The engine stopped.")
                    yield chunk
        finally:
            link.streams.pop(request.request_id, None)
            if not finished and link.is_routable:
                self._abort_soon(link, request.request_id)
            link.close_if_drained()

    async def stats(self) -> dict[str, Any]:
        """Every connected replica's ``EngineStats``, by replica id; replicas that do not answer are left out."""
        return await self._ask_all("stats")

    async def status(self) -> dict[str, ReplicaStatus]:
        """Every connected replica's account of itself, by replica id; replicas that do not answer are left out."""
        return await self._ask_all("status")

    async def _ask_all(self, method: str) -> dict[str, Any]:
        links = [link for link in self._links.values() if link.is_routable]
        calls = [asyncio.wait_for(self._call(link, method), _CALL_TIMEOUT_S) for link in links]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return {
            link.replica_id: answer
            for link, answer in zip(links, answers, strict=True)
            if not isinstance(answer, BaseException)
        }

    async def _submit(self, request: GenerateRequest) -> _Link:
        """Offer the request to one replica after another, in the policy's order, until one takes it."""
        retry_after_s = 0.0
        refused: set[str] = set()
        await self._wait_connected()
        while candidates := [s for s in self.snapshots if s.replica_id not in refused]:
            routing = RoutingRequest(len(request.prompt_token_ids), self._sequence)
            self._sequence += 1
            link = self._links[self._policy(routing, candidates)]
            reply = await self._offer(link, request)
            if reply.accepted:
                return link
            if reply.error is not None:
                raise InvalidRequestError(reply.error, param=reply.param)
            refused.add(link.replica_id)
            retry_after_s = max(retry_after_s, reply.retry_after_s or 0.0)
        if retry_after_s:
            raise QueueFullError("Every replica's queue is full; try again later.", retry_after_s)
        raise EngineDeadError("No replica could take the request; try again later.")

    async def _offer(self, link: _Link, request: GenerateRequest) -> SubmitReply:
        """Send a request to one replica; a replica that dies or does not answer counts as refusing."""
        request_id = request.request_id
        link.streams[request_id] = _TokenStream()
        link.unreported[request_id] = len(request.prompt_token_ids) + 1
        reply = SubmitReply(False)
        try:
            call = self._call(link, "submit", self._client_id, request)
            reply = await asyncio.wait_for(call, _CALL_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("replica %s did not take request %s: %s", link.replica_id, request_id, error)
        finally:
            link.unreported.pop(request_id, None)
            if not reply.accepted:
                link.streams.pop(request_id, None)
                if link.is_routable and reply.error is None and reply.retry_after_s is None:
                    self._abort_soon(link, request_id)  # cancelled or timed out: it may have been queued
        return reply

    async def _wait_connected(self) -> None:
        if self.snapshots:
            return
        try:
            await asyncio.wait_for(self._connected.wait(), self._start_timeout_s)
        except TimeoutError:
            raise EngineDeadError(
                f"No replica became ready within {self._start_timeout_s:.0f} s; try again later."
            ) from None

    def _abort_soon(self, link: _Link, request_id: str) -> None:
        async def abort() -> None:
            try:
                await asyncio.wait_for(self._call(link, "abort", [request_id]), _CALL_TIMEOUT_S)
            except (RayError, RayServeException, TimeoutError) as error:
                logger.warning("aborting %s on %s failed: %s", request_id, link.replica_id, error)

        task = asyncio.get_running_loop().create_task(abort())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _call(self, link: _Link, method: str, *args: Any) -> Any:
        """Call one replica.

        The call runs in a context of its own: Serve's router tells calls apart by the HTTP request that they come
        from, and would take two calls of one request for the same.
        """

        async def call() -> Any:
            return await getattr(self._handle, method).remote(*args, replica_id=link.replica_id)

        return await asyncio.get_running_loop().create_task(call(), context=contextvars.Context())

    def _on_replicas(self, replica_ids: frozenset[str]) -> None:
        for link in self._links.values():
            if link.replica_id not in replica_ids and not link.draining:
                link.draining = True
                link.close_if_drained()
        for replica_id in replica_ids - self._links.keys():
            link = self._links[replica_id] = _Link(replica_id)
            link.task = asyncio.get_running_loop().create_task(self._read_steps(link))
        self._note_connected()

    async def _read_steps(self, link: _Link) -> None:
        """Follow one replica's step stream; connect again for as long as Serve lists the replica."""
        try:
            while not link.draining:
                await self._read_steps_once(link)
        finally:
            link.fail(EngineDeadError(f"Replica {link.replica_id} stopped."))
            self._links.pop(link.replica_id, None)

    async def _read_steps_once(self, link: _Link) -> None:
        try:
            handle: Any = self._handle.options(stream=True)
            steps = handle.steps.remote(self._client_id, replica_id=link.replica_id)
            async for message in steps:
                self._deliver(link, message)
            error = "its step stream ended"
        except (RayError, RayServeException, EngineDeadError) as failure:
            error = str(failure)
        logger.warning("lost replica %s: %s", link.replica_id, error)
        link.fail(EngineDeadError(f"Replica {link.replica_id} died."))
        self._note_connected()
        await asyncio.sleep(_RECONNECT_S)

    def _deliver(self, link: _Link, message: StepMessage) -> None:
        was_connected = link.state is not None
        link.state = message.state
        if not was_connected:
            self._note_connected()
        for chunk in message.chunks:
            stream = link.streams.get(chunk.request_id)
            if stream is not None:
                stream.put(chunk)

    def _note_connected(self) -> None:
        if self.snapshots:
            self._connected.set()
        else:
            self._connected.clear()
