"""The Serve deployment around one engine.

Runs the engine on its own thread, so that the event loop never waits for a step, and hands its output to every
connected ingress as one message per step. Knows Serve and the engine's thread; knows nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import ray

from cluster.autoscaling.replica_meter import ReplicaMeter
from cluster.leases.client import ClusterLeases
from cluster.messages import GenerateRequest, IngressLoad, ReplicaState, ReplicaStatus, StepMessage, SubmitReply
from cluster.routing.prefix_index import PrefixFeed, PrefixIndex
from cluster.serving.outbox import Outbox
from cluster.serving.spare import keep_spare
from cluster.serving.step_socket import StepServer
from workers.config import EngineConfig
from workers.engine.start import start_engine
from workers.engine.stats import EngineStats
from workers.engine.thread import EngineThread
from workers.errors import EngineDeadError, UserError
from workers.outputs import TokenChunk
from workers.scheduler.prefix_journal import PrefixChanges
from workers.startup.account import StartupAccount

if TYPE_CHECKING:
    from workers.engine.engine import Engine

logger = logging.getLogger("ray.serve")


class EngineReplica:
    """One engine behind Serve.

    Args:
        engine: The fields of an ``EngineConfig``.
        max_queued_requests: Requests that may wait here before a submission is refused.
        step_timeout_s: An engine that is at one step for longer than this hangs, and the replica must be replaced.
        heartbeat_s: Pause after which an ingress hears that the replica lives, in seconds.
        keeps_spare: Whether a process for the next replica is kept on this node.

    Every public coroutine takes ``replica_id``, which ``PinnedRouter`` reads on the way here.
    """

    def __init__(
        self,
        engine: dict[str, Any],
        max_queued_requests: int,
        step_timeout_s: float,
        heartbeat_s: float,
        keeps_spare: bool = False,
    ) -> None:
        account = StartupAccount()
        self._config = EngineConfig.create(**engine)
        self._max_queued_requests = max_queued_requests
        self._step_timeout_s = step_timeout_s
        self._heartbeat_s = heartbeat_s
        self._loop = asyncio.get_event_loop()
        self._outboxes: dict[str, Outbox] = {}
        self._owners: dict[str, str] = {}
        self._step_server = StepServer(lambda client_id: self._outboxes[client_id].get())
        self._prefixes = PrefixIndex()
        self._thread = EngineThread(
            lambda: self._make_engine(account), self._on_step, self._on_death, self._on_prefix_changes
        )
        self._engine = self._thread.wait_ready()  # for reading only
        self._max_num_seqs = self._config.max_num_seqs
        self._stats = self._engine.stats()
        self._state = self._make_state(self._stats)
        start_s = account.report().ready_s or 0.0
        self._meter = ReplicaMeter(time.monotonic, self._stats, self._max_num_seqs, start_s)
        if keeps_spare:
            keep_spare()

    async def submit(
        self, client_id: str, requests: list[GenerateRequest], replica_id: str | None = None
    ) -> list[SubmitReply]:
        """Queue requests whose tokens go to ``client_id``'s step stream, which must be open; one reply for each."""
        if client_id not in self._outboxes:
            return [SubmitReply(False)] * len(requests)
        return await asyncio.gather(*(self._submit(client_id, request) for request in requests))

    async def _submit(self, client_id: str, request: GenerateRequest) -> SubmitReply:
        num_waiting = self._state.num_waiting
        if num_waiting >= self._max_queued_requests and not request.attempt:
            return SubmitReply(False, retry_after_s=self._retry_after_s())
        self._owners[request.request_id] = client_id
        try:
            accepted = self._thread.add(
                request.request_id,
                request.prompt_token_ids,
                request.params,
                request.resume_token_ids,
                goes_first=request.attempt > 0,
            )
            await asyncio.wrap_future(accepted)
        except UserError as error:
            self._owners.pop(request.request_id, None)
            return SubmitReply(False, error=str(error), param=error.param)
        return SubmitReply(True)

    async def abort(self, request_ids: list[str], replica_id: str | None = None) -> None:
        """End requests and free their blocks; unknown ids have just ended by themselves."""
        for request_id in request_ids:
            self._owners.pop(request_id, None)
        self._thread.abort(request_ids)

    async def steps(
        self, client_id: str, node_id: str, replica_id: str | None = None
    ) -> AsyncIterator[StepMessage | str]:
        """The stream of step messages for one connection of an ingress.

        To an ingress on this node it gives the path of a socket that has them instead, and stays open as long as the
        connection. Ends with an error if the engine stops or hangs. When the ingress goes away its requests are
        aborted.
        """
        outbox = self._outboxes[client_id] = Outbox(self._state, PrefixFeed(self._prefixes))
        heartbeat = self._loop.create_task(self._beat(outbox))
        try:
            if node_id and node_id == self._node_id():
                yield await self._step_server.path()
                while True:
                    await asyncio.sleep(self._heartbeat_s)
                    self._raise_if_dead()
            while True:
                yield await outbox.get()
                self._raise_if_dead()
        finally:
            heartbeat.cancel()
            del self._outboxes[client_id]
            self._step_server.close(client_id)
            orphans = [request_id for request_id, owner in self._owners.items() if owner == client_id]
            if orphans:
                logger.info("connection %s closed; aborting its %d requests", client_id, len(orphans))
                await self.abort(orphans)

    async def stats(self, replica_id: str | None = None) -> EngineStats:
        """The engine's counters after its last step."""
        return self._stats

    async def status(self, replica_id: str | None = None) -> ReplicaStatus:
        """The load after the last step, the graph layer's account, and that of the start."""
        return ReplicaStatus(self._state, self._engine.graph_report(), self._engine.startup_report())

    async def report_ingress(self, ingress_id: str, load: IngressLoad, replica_id: str | None = None) -> None:
        """What waits at an ingress and comes in there, for the autoscaler."""
        self._meter.note_ingress(ingress_id, load)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve several times per second where autoscaling is on."""
        return self._meter.load().to_metrics()

    def __del__(self) -> None:
        """Called by Serve once this replica has drained: the engine keeps what the next start can use."""
        if hasattr(self, "_thread"):
            self._thread.stop()
            self._step_server.shut_down()

    def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica."""
        self._raise_if_dead()

    def _make_engine(self, account: StartupAccount) -> Engine:
        """Build the engine; called on its thread."""
        return start_engine(self._config, account, ClusterLeases())

    def _node_id(self) -> str:
        """Ray's id of this node."""
        return str(ray.get_runtime_context().get_node_id())

    def _raise_if_dead(self) -> None:
        if self._thread.death is not None:
            raise EngineDeadError(f"The engine stopped: {self._thread.death}")
        if self._thread.busy_s > self._step_timeout_s:
            raise EngineDeadError(f"The engine hangs: one step has taken more than {self._step_timeout_s:g} s.")

    async def _beat(self, outbox: Outbox) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            outbox.wake()

    def _on_step(self, chunks: list[TokenChunk], stats: EngineStats) -> None:
        """On the engine thread: hand over to the event loop."""
        self._loop.call_soon_threadsafe(self._publish, chunks, stats)

    def _on_prefix_changes(self, changes: PrefixChanges) -> None:
        """On the engine thread, before the step's results."""
        self._loop.call_soon_threadsafe(self._note_prefixes, changes)

    def _note_prefixes(self, changes: PrefixChanges) -> None:
        self._prefixes.change(changes)
        for outbox in self._outboxes.values():
            outbox.prefixes.note(changes)

    def _on_death(self, error: BaseException) -> None:
        logger.error("engine died: %r; Serve will replace this replica", error)

    def _publish(self, chunks: list[TokenChunk], stats: EngineStats) -> None:
        self._stats = stats
        self._meter.note_step(stats)
        self._state = self._make_state(stats)
        by_client: dict[str, list[TokenChunk]] = {}
        for chunk in chunks:
            owner = self._owners.get(chunk.request_id)
            if owner is None:
                continue  # aborted while its last step ran
            by_client.setdefault(owner, []).append(chunk)
            if chunk.finish_reason is not None:
                del self._owners[chunk.request_id]
        for client_id, outbox in self._outboxes.items():
            outbox.put(by_client.get(client_id, []), self._state)

    def _make_state(self, stats: EngineStats) -> ReplicaState:
        scheduler = stats.scheduler
        return ReplicaState(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            free_blocks=scheduler.num_free_blocks,
            total_blocks=scheduler.num_total_blocks,
            outstanding_tokens=scheduler.num_outstanding_tokens,
            tokens_to_generate=scheduler.num_tokens_to_generate,
            token_budget_left=scheduler.token_budget_left,
            cached_blocks=scheduler.num_cached_blocks,
            max_num_seqs=self._max_num_seqs,
            decode_sizes=stats.decode_sizes,
            artifact_warm=stats.artifact_warm,
            step=stats.num_steps,
        )

    def _retry_after_s(self) -> float:
        """Seconds until the queue has room, at the rate at which requests finished so far."""
        finished = max(self._stats.num_finished, 1)
        seconds_per_request = self._stats.busy_seconds / finished
        return min(max(seconds_per_request, 1.0), 60.0)
