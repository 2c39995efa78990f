"""Carries out the capture plan: one capture at a time, with its memory checked and everybody told.

Knows the order of things around a capture. What a dummy run looks like is the runner's part, when there is time
for one is the engine loop's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from workers.errors import ConfigError
from workers.graphs.backends.base import GraphBackend
from workers.graphs.counters import GraphCounters
from workers.graphs.descriptor import BatchDescriptor, GraphKey, describe_key
from workers.graphs.dispatcher import GraphDispatcher
from workers.graphs.memory import GraphMemoryBudget
from workers.graphs.plan import CapturePlan
from workers.modes import CUDAGraphMode

logger = logging.getLogger(__name__)

#: Runs the model once on made-up inputs of the descriptor's shape, in a forward context of that runtime mode.
DummyRun = Callable[[CUDAGraphMode, BatchDescriptor], None]


class GraphCapturer:
    """Captures what the plan hands out.

    Args:
        run: Called in mode NONE to warm up, unless a warm-up of an earlier capture covers it, and then in the graph's
            mode to capture.
        counters: Takes the times of warm-up runs and of the first set.
    """

    def __init__(
        self,
        backend: GraphBackend,
        dispatcher: GraphDispatcher,
        plan: CapturePlan,
        budget: GraphMemoryBudget,
        run: DummyRun,
        *,
        counters: GraphCounters | None = None,
    ) -> None:
        self._backend = backend
        self._dispatcher = dispatcher
        self._plan = plan
        self._budget = budget
        self._run = run
        self._counters = counters if counters is not None else GraphCounters()
        self._warm_sizes: set[int] = set()

    def capture_first_set(self) -> None:
        """Capture until the plan is ready, after one clean-up of the device's memory.

        Raises:
            ConfigError: The graphs do not fit in the memory limit, whose policy is ERROR.
            Exception: Whatever a capture raises, other than running out of memory.
        """
        if self._plan.is_ready:
            return
        started = time.perf_counter()
        with self._backend.capturing():
            while not self._plan.is_ready:
                key = self._plan.next_capture(idle=False)
                assert key is not None
                self._capture(key)
        self._counters.first_set_seconds = time.perf_counter() - started

    def capture_next(self, idle: bool) -> bool:
        """Make at most one capture of those left; the engine loop calls this while there is nothing to run.

        A capture that fails here is logged and left out, since the replica can serve without it.

        Returns:
            Whether there was something to do, so that an idle loop knows when it may sleep.
        """
        key = self._plan.next_capture(idle)
        if key is None:
            return False
        self._capture_or_leave_out(key)
        return True

    def capture_needed(self) -> bool:
        """Make one capture between two steps of a busy engine, if the batches run so far would have gained from it.

        An engine that is never idle so gets the graphs that its traffic asks for. Failures are handled as in
        :meth:`capture_next`; how often this may be called is the pacer's part.

        Returns:
            Whether a capture was made.
        """
        key = None if self._plan.is_done else self._plan.next_needed()
        if key is None:
            return False
        self._capture_or_leave_out(key)
        return True

    def clear(self) -> None:
        """Drop every graph and start over, for a weight reload; batches run without graphs meanwhile."""
        self._dispatcher.clear()
        self._backend.clear()
        self._budget.clear()
        self._plan.reset()

    def _capture_or_leave_out(self, key: GraphKey) -> None:
        with self._backend.capturing(clean_up=False):
            try:
                self._capture(key)
            except (RuntimeError, ConfigError) as error:
                logger.warning("the %s failed and is left out: %s", describe_key(key), error)
                self._drop(key, f"the capture failed: {error}")

    def _capture(self, key: GraphKey) -> None:
        mode, descriptor = key
        if not self._budget.admit(mode, descriptor):
            self._drop(key, self._budget.skipped[-1].reason)
            return
        held_before = self._backend.bytes_held()
        try:
            self._warm_up(key)
            self._run(mode, descriptor)
        except torch.OutOfMemoryError as error:
            logger.warning("no memory for the %s: %s", describe_key(key), error)
            self._drop(key, "the device ran out of memory during the capture")
            return
        except BaseException:
            # A piecewise forward pass may have captured some of its pieces.
            self._backend.discard(mode, descriptor)
            raise
        if not self._budget.record(mode, descriptor, self._backend.bytes_held() - held_before):
            self._drop(key, self._budget.skipped[-1].reason)
            return
        self._budget.note_held(self._backend.bytes_held())
        self._plan.mark_captured(key)
        self._dispatcher.mark_captured(mode, descriptor)

    def _warm_up(self, key: GraphKey) -> None:
        mode, descriptor = key
        # Pieces depend on the number of tokens alone: a full graph of that many has run them. Attention, which is
        # recorded in full graphs only, depends on the kind of batch too.
        if mode is CUDAGraphMode.PIECEWISE and descriptor.num_tokens in self._warm_sizes:
            return
        started = time.perf_counter()
        self._run(CUDAGraphMode.NONE, descriptor)
        self._counters.record_warm_up(time.perf_counter() - started)
        self._warm_sizes.add(descriptor.num_tokens)

    def _drop(self, key: GraphKey, reason: str) -> None:
        self._backend.discard(*key)
        self._budget.note_held(self._backend.bytes_held())
        self._plan.drop(key, reason)
        self._dispatcher.mark_dropped(*key)
