"""The connection of one ingress to one replica: its step stream, the requests that run there, calls to it.

A replica says something at least once per heartbeat; a link that hears nothing for the heartbeat's time-out is lost,
whatever the cause: the process is killed, stopped, or out of reach. Losing a link fails its streams at once and
connects again for as long as Serve lists the replica. Each connection has an id of its own, under which the replica
keeps what it owes, so that messages of an earlier one cannot be mixed into it. Knows Serve handles and messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import uuid
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.messages import GenerateRequest, ReplicaState, StepMessage, SubmitReply
from cluster.routing.prefix_index import PrefixIndex
from cluster.routing.snapshot import ReplicaSnapshot
from cluster.serving.failover import ReplicaLostError
from cluster.serving.step_socket import read_messages
from cluster.serving.token_stream import TokenStream
from workers.errors import EngineDeadError
from workers.outputs import TokenChunk

logger = logging.getLogger("ray.serve")

#: Longest wait for a replica's answer to a call, in seconds.
_CALL_TIMEOUT_S = 30.0
#: Pause before connecting again to a replica that Serve still lists, in seconds.
_RECONNECT_S = 0.5
#: A link is lost when this many ticks in a row brought no message.
SILENT_TICKS = 4

_FAILURES = (RayError, RayServeException, EngineDeadError, TimeoutError)


class ReplicaLink:
    """One replica as an ingress sees it.

    Args:
        replica_id: Serve's unique id.
        handle: Handle of the model's deployment.
        on_change: Called when the link becomes usable or stops being so.
        on_state: Called when the replica has reported its state.
        node_id: Ray's id of this process' node; a replica on it sends through a socket.

    Attributes:
        state: The replica's last report; None while not connected.
        prefixes: Which prefix blocks the replica holds.
        connection_id: Of the current connection, or the last one.
        is_draining: Serve no longer lists the replica: what runs there finishes, nothing new goes there.
    """

    def __init__(
        self,
        replica_id: str,
        handle: DeploymentHandle[Any],
        on_change: Callable[[], None],
        on_state: Callable[[], None],
        node_id: str,
    ) -> None:
        self.replica_id = replica_id
        self.state: ReplicaState | None = None
        self.prefixes = PrefixIndex()
        self.is_draining = False
        self.connection_id = ""
        self._handle = handle.options(_by_reference=False)  # gRPC: half the cost of an actor's stream item
        self._on_change = on_change
        self._on_state = on_state
        self._streams: dict[str, TokenStream] = {}
        self._unreported: dict[str, int] = {}
        self._taken: list[str] = []
        self._offers: set[asyncio.Task[Any]] = set()
        self._parcel: dict[str, GenerateRequest] | None = None
        self._parcel_call: asyncio.Task[dict[str, SubmitReply]] | None = None
        self._node_id = node_id
        self._num_silent_ticks = 0
        self._reader: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def is_routable(self) -> bool:
        """Whether new requests may go there."""
        return self.state is not None and not self.is_draining

    def snapshot(self, cached_tokens: int = 0) -> ReplicaSnapshot:
        """The replica as routing policies see it, with the part of a prompt that it has cached."""
        assert self.state is not None
        return ReplicaSnapshot(
            self.replica_id, self.state, len(self._unreported), sum(self._unreported.values()), cached_tokens
        )

    # The step stream.

    async def follow(self) -> None:
        """Read the step stream, and connect again when it ends, until Serve stops listing the replica."""
        try:
            while not self.is_draining:
                self.connection_id = uuid.uuid4().hex
                self._num_silent_ticks = 0
                self._reader = asyncio.get_running_loop().create_task(self._read_steps())
                await asyncio.wait([self._reader])
                self._lose(_ending(self._reader))
                if not self.is_draining:
                    await asyncio.sleep(_RECONNECT_S)
        finally:
            if self._reader is not None:
                self._reader.cancel()
            self._lose("it was stopped")

    def tick(self) -> None:
        """Called at a fixed pace on the event loop, so that a pause of this process is not taken for silence."""
        self._num_silent_ticks += 1
        is_silent = self._num_silent_ticks > SILENT_TICKS
        if is_silent and self.state is not None and self._reader is not None:
            self._lose("it has been silent for too long")
            self._reader.cancel()

    def drain(self) -> None:
        """Serve is stopping the replica: send nothing new, and let go once the last request is done."""
        self.is_draining = True
        self._close_if_drained()

    async def _read_steps(self) -> None:
        handle: Any = self._handle.options(stream=True)
        steps = handle.steps.remote(self.connection_id, self._node_id, replica_id=self.replica_id)
        try:
            async for item in steps:
                if isinstance(item, StepMessage):
                    self._deliver(item)
                    continue
                try:
                    async for message in read_messages(item, self.connection_id):
                        self._deliver(message)
                except OSError as error:
                    logger.warning("no socket to replica %s (%s); going through Ray", self.replica_id, error)
                    self._node_id = ""
                    return
        finally:
            steps.cancel()

    def _deliver(self, message: StepMessage) -> None:
        was_connected = self.state is not None
        self.state = message.state
        self._num_silent_ticks = 0
        if message.prefixes is not None:
            self.prefixes.apply(message.prefixes)
        if self._unreported:
            self._forget_reported(message)
        if not was_connected:
            self._on_change()
        chunks: dict[str, list[TokenChunk]] = {}
        for chunk in message.chunks:
            chunks.setdefault(chunk.request_id, []).append(chunk)
        for request_id, own in chunks.items():
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put(own)
        self._on_state()

    def _forget_reported(self, message: StepMessage) -> None:
        """The state shows a request once it has answered, and what the replica had taken before this message."""
        for request_id in self._taken:
            self._unreported.pop(request_id, None)
        self._taken.clear()
        for chunk in message.chunks:
            self._unreported.pop(chunk.request_id, None)

    def _lose(self, why: str) -> None:
        """Fail what runs there; the requests go on elsewhere."""
        if self._streams or (self.state is not None and not self.is_draining):
            logger.warning("lost replica %s: %s; its %d requests go on", self.replica_id, why, len(self._streams))
        error = ReplicaLostError(f"Replica {self.replica_id} was lost: {why}.", self.connection_id)
        self.state = None
        self._unreported.clear()
        self._taken.clear()
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        for offer in self._offers:
            offer.cancel()
        self._parcel = None
        self._on_change()

    def _close_if_drained(self) -> None:
        if self.is_draining and not self._streams and self._reader is not None:
            self._reader.cancel()

    # Requests.

    async def offer(self, request: GenerateRequest, cached_tokens: int = 0) -> tuple[TokenStream, SubmitReply]:
        """Send a request, of which the replica probably has ``cached_tokens`` computed.

        A replica that does not answer refuses it without a reason.

        One that dies meanwhile counts as having taken it, since it may have died of it: the stream tells.

        Returns:
            The request's chunks to come, which the caller must :meth:`release`, and the answer.
        """
        request_id = request.request_id
        stream = self._streams[request_id] = TokenStream()
        self._unreported[request_id] = len(request.prompt_token_ids) + 1 - cached_tokens
        call = self._post(request)
        reply = SubmitReply(False)
        try:
            await asyncio.wait([call])
            reply = self._read_reply(call, request_id)
        finally:
            if self._parcel is not None:
                self._parcel.pop(request_id, None)  # cancelled before it was sent
            if reply.accepted:
                self._taken.append(request_id)
            else:
                self._unreported.pop(request_id, None)
                # Cancelled or not answered: it may have been queued.
                self.release(request_id, abort=reply.error is None and reply.retry_after_s is None)
        return stream, reply

    def _post(self, request: GenerateRequest) -> asyncio.Task[dict[str, SubmitReply]]:
        """Send a request, in one call with all others of this turn of the event loop: calls cost more than requests."""
        if self._parcel is None or self._parcel_call is None:
            self._parcel = {}
            self._parcel_call = asyncio.get_running_loop().create_task(self._send_parcel())
            self._offers.add(self._parcel_call)
            self._parcel_call.add_done_callback(self._offers.discard)
        self._parcel[request.request_id] = request
        return self._parcel_call

    async def _send_parcel(self) -> dict[str, SubmitReply]:
        parcel, self._parcel = self._parcel or {}, None
        replies = await self._call("submit", self.connection_id, [*parcel.values()])
        return dict(zip(parcel, replies, strict=True))

    def _read_reply(self, call: asyncio.Task[dict[str, SubmitReply]], request_id: str) -> SubmitReply:
        if call.cancelled():
            return SubmitReply(True)  # the link was lost
        error = call.exception()
        if error is None:
            return call.result()[request_id]
        logger.warning("replica %s did not take a request: %s", self.replica_id, error)
        if isinstance(error, RayActorError) and self._reader is not None:
            self._lose("it died")
            self._reader.cancel()
            return SubmitReply(True)
        if not isinstance(error, _FAILURES):
            raise error
        return SubmitReply(False)

    def release(self, request_id: str, *, abort: bool) -> None:
        """Forget a request; ``abort`` ends it on the replica, if there still is one."""
        self._streams.pop(request_id, None)
        if abort and self.state is not None:
            task = asyncio.get_running_loop().create_task(self._abort(request_id))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        self._close_if_drained()

    async def ask(self, method: str, *args: Any) -> Any:
        """What a method of the replica returns, or None if it does not answer."""
        try:
            return await self._call(method, *args)
        except _FAILURES:
            return None

    async def _abort(self, request_id: str) -> None:
        try:
            await self._call("abort", [request_id])
        except _FAILURES as error:
            logger.warning("aborting %s on %s failed: %s", request_id, self.replica_id, error)

    async def _call(self, method: str, *args: Any) -> Any:
        """Call the replica.

        The call runs in a context of its own: Serve's router tells calls apart by the HTTP request that they come
        from, and would take two calls of one request for the same.
        """

        async def call() -> Any:
            return await getattr(self._handle, method).remote(*args, replica_id=self.replica_id)

        task = asyncio.get_running_loop().create_task(call(), context=contextvars.Context())
        return await asyncio.wait_for(task, _CALL_TIMEOUT_S)


async def call_any_replica(handle: DeploymentHandle[Any], method: str) -> None:
    """Call whichever replica there is, or comes; what it answers does not matter."""

    async def call() -> Any:
        return await getattr(handle, method).remote(replica_id=None)

    with contextlib.suppress(*_FAILURES):
        await asyncio.get_running_loop().create_task(call(), context=contextvars.Context())


def _ending(reader: asyncio.Task[None]) -> str:
    if reader.cancelled():
        return "the connection was closed"
    error = reader.exception()
    if error is None:
        return "its step stream ended"
    if not isinstance(error, _FAILURES):
        logger.error("reading a step stream failed", exc_info=error)
    return str(error)
