"""An engine on a thread of its own, driven by commands and answering through a callback.

The thread is the only one that touches the engine; everybody else sends commands. Knows queues and threads, not
who listens.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from workers.engine.heap import frozen_heap
from workers.engine.stats import EngineStats
from workers.errors import EngineDeadError, UserError
from workers.outputs import FinishReason, TokenChunk
from workers.sampling_params import SamplingParams
from workers.scheduler.prefix_journal import PrefixChanges

if TYPE_CHECKING:
    from workers.engine.engine import Engine

logger = logging.getLogger(__name__)

#: Longest sleep of an idle thread, in seconds; it wakes at once for a command.
_IDLE_WAIT_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class AddRequest:
    """Queue a request; ``accepted`` resolves to None, or raises the ``UserError`` that refused it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    resume_token_ids: Sequence[int]
    goes_first: bool
    accepted: Future[None]


@dataclasses.dataclass(frozen=True, slots=True)
class AbortRequests:
    """End requests and return their blocks."""

    request_ids: list[str]


_Command = AddRequest | AbortRequests | None
#: Called on the engine thread after every step that produced something, and after commands that changed the load.
StepListener = Callable[[list[TokenChunk], EngineStats], None]
#: Called on the engine thread, before the step listener, with what entered and left the prefix cache.
PrefixListener = Callable[[PrefixChanges], None]


class EngineThread:
    """Runs ``make_engine()`` and then its steps on one thread.

    Args:
        make_engine: Builds the engine; runs on the thread, because some of torch's state is per thread.
        on_step: Receives each step's chunks and the engine's state after it.
        on_death: Called once with the error if the engine fails; after that every call raises EngineDeadError.
        on_prefix_changes: Receives changes of the prefix cache; without it nobody notes them.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        on_step: StepListener,
        on_death: Callable[[BaseException], None],
        on_prefix_changes: PrefixListener | None = None,
    ) -> None:
        self._on_prefix_changes = on_prefix_changes
        self._make_engine = make_engine
        self._on_step = on_step
        self._on_death = on_death
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._ready: Future[Engine] = Future()
        self._death: BaseException | None = None
        self._live: set[str] = set()
        self._busy_since_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def wait_ready(self, timeout_s: float | None = None) -> Engine:
        """Block until the engine is built and return it (for reading only); raises what building it raised."""
        return self._ready.result(timeout_s)

    @property
    def death(self) -> BaseException | None:
        """The error that ended the engine, or None while it lives."""
        return self._death

    @property
    def busy_s(self) -> float:
        """Seconds since the thread began what it is doing: a step, or taking commands; 0 while it waits."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        resume_token_ids: Sequence[int] = (),
        *,
        goes_first: bool = False,
    ) -> Future[None]:
        """Queue a request; the future resolves once the engine has accepted it, or raises why not."""
        self._check_alive()
        accepted: Future[None] = Future()
        self._commands.put(AddRequest(request_id, prompt_token_ids, params, resume_token_ids, goes_first, accepted))
        self._check_alive()  # the engine may have died, and answered what was queued, before the put
        return accepted

    def abort(self, request_ids: list[str]) -> None:
        """End requests before the next step; ids that are not live are ignored."""
        self._check_alive()
        self._commands.put(AbortRequests(request_ids))

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop after the running step; requests that still run are dropped."""
        self._commands.put(None)
        self._thread.join(timeout_s)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(f"The engine stopped: {self._death}") from self._death

    def _run(self) -> None:
        try:
            engine = self._make_engine()
            if self._on_prefix_changes is not None:
                engine.follow_prefixes()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the engine
            self._death = error
            self._ready.set_exception(error)
            return
        self._ready.set_result(engine)
        try:
            with frozen_heap():
                self._loop(engine)
        except BaseException as error:
            logger.exception("the engine died")
            self._die(error, engine)
        engine.save_traffic()

    def _loop(self, engine: Engine) -> None:
        has_idle_work = True
        while True:
            self._busy_since_s = None
            commands = self._next_commands(wait=not engine.has_unfinished and not has_idle_work)
            self._busy_since_s = time.monotonic()
            for command in commands:
                if command is None:
                    return
                self._apply(engine, command)
            chunks: list[TokenChunk] = []
            if engine.has_unfinished:
                chunks = engine.step()
            else:
                has_idle_work = engine.use_idle_time()
            for chunk in chunks:
                if chunk.finish_reason is not None:
                    self._live.discard(chunk.request_id)
            if self._on_prefix_changes is not None and (changes := engine.take_prefix_changes()) is not None:
                self._on_prefix_changes(changes)
            if chunks or commands:
                self._on_step(chunks, engine.stats())

    def _next_commands(self, *, wait: bool) -> list[_Command]:
        commands: list[_Command] = []
        try:
            if wait:
                commands.append(self._commands.get(timeout=_IDLE_WAIT_S))
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            return commands

    def _apply(self, engine: Engine, command: AddRequest | AbortRequests) -> None:
        if isinstance(command, AbortRequests):
            self._live.difference_update(command.request_ids)
            engine.abort(command.request_ids)
            return
        try:
            engine.add_request(
                command.request_id,
                command.prompt_token_ids,
                command.params,
                resume_token_ids=command.resume_token_ids,
                goes_first=command.goes_first,
            )
        except UserError as error:
            command.accepted.set_exception(error)
        else:
            self._live.add(command.request_id)
            command.accepted.set_result(None)

    def _die(self, error: BaseException, engine: Engine) -> None:
        """Tell everybody: running requests get an error chunk, waiting callers an exception."""
        self._death = error
        message = f"The engine stopped: {type(error).__name__}: {error}"
        chunks = [
            TokenChunk(request_id, finish_reason=FinishReason.ERROR, error=message) for request_id in sorted(self._live)
        ]
        for command in self._next_commands(wait=False):
            if isinstance(command, AddRequest):
                command.accepted.set_exception(EngineDeadError(message))
        self._on_step(chunks, engine.stats())
        self._on_death(error)
