"""The wrapper that turns a callable into captured graphs, one per batch descriptor.

It only obeys: the forward context says which mode and graph a batch runs in, and the backend records and replays.
Knows nothing about how either is chosen or about what the callable computes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from workers.graphs.backends.base import CapturedGraph, GraphBackend
from workers.graphs.context import get_forward_context, is_forward_context_available
from workers.graphs.counters import GraphCounters, KeyCounters
from workers.graphs.descriptor import BatchDescriptor, describe_key
from workers.graphs.inputs import InputLeaf, describe_inputs, find_mismatch, positional_names
from workers.modes import CUDAGraphMode


@dataclasses.dataclass(slots=True)
class _Entry:
    graph: CapturedGraph
    counters: KeyCounters
    inputs: dict[str, InputLeaf] | None


class CUDAGraphWrapper:
    """Runs a callable eagerly, captures it or replays it, as the forward context says.

    - No context, mode NONE, or a mode other than ``runtime_mode``: eagerly. So a FULL wrapper can stand around
      PIECEWISE ones: each captures and replays in its own mode and is transparent in the other.
    - An unknown descriptor: capture, inside ``with backend.capturing()`` only.
    - A known descriptor: replay, one launch, and return the captured outputs.

    The outputs of a replay stay valid until the next replay or capture of a graph in the same pool.

    Args:
        runnable: Reads tensors at fixed addresses and returns tensors, in tuples, lists or dicts if several.
        runtime_mode: FULL or PIECEWISE.
        backend: Records and replays; shared by all wrappers of an engine, and its pool with it.
        name: Of the captured region, for messages.
        debug_graph_inputs: Compare every input's address, shape and dtype, and every constant, with what the
            capture saw, before each replay.
        counters: Counts captures and replays.
    """

    def __init__(
        self,
        runnable: Callable[..., Any],
        runtime_mode: CUDAGraphMode,
        backend: GraphBackend,
        *,
        name: str = "model",
        debug_graph_inputs: bool = False,
        counters: GraphCounters | None = None,
    ) -> None:
        assert runtime_mode in (CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE), f"{runtime_mode} holds no graphs"
        self.runtime_mode = runtime_mode
        self.name = name
        self._runnable = runnable
        self._backend = backend
        self._counters = counters if counters is not None else GraphCounters()
        self._checks_addresses = debug_graph_inputs
        self._checks_inputs = debug_graph_inputs or backend.checks_shapes
        self._positional_names = positional_names(runnable) if self._checks_inputs else []
        self._entries: dict[BatchDescriptor, _Entry] = {}
        backend.register(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped callable, in whichever of the three ways.

        Raises:
            RuntimeError: The descriptor is unknown and capturing is not allowed now, or an input is not where
                (``debug_graph_inputs``) or not of the shape that the capture saw.
        """
        if not is_forward_context_available():
            return self._runnable(*args, **kwargs)
        context = get_forward_context()
        if context.cudagraph_runtime_mode is not self.runtime_mode:
            return self._runnable(*args, **kwargs)
        descriptor = context.batch_descriptor
        assert descriptor is not None
        entry = self._entries.get(descriptor)
        if entry is None:
            return self._capture(descriptor, args, kwargs)
        if entry.inputs is not None:
            self._check_inputs(entry.inputs, descriptor, args, kwargs)
        entry.graph.replay()
        entry.counters.num_replays += 1
        return entry.graph.outputs

    def unwrap(self) -> Callable[..., Any]:
        """The wrapped callable."""
        return self._runnable

    def has_graph(self, descriptor: BatchDescriptor) -> bool:
        """Whether a batch of this descriptor can be replayed."""
        return descriptor in self._entries

    def captured_descriptors(self) -> list[BatchDescriptor]:
        """What this wrapper has graphs for, in capture order."""
        return list(self._entries)

    def discard(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """Drop one graph, if there is one; its pool memory is reused by later captures."""
        entry = self._entries.pop(descriptor, None) if mode is self.runtime_mode else None
        if entry is not None:
            self._counters.record_discard(self.runtime_mode, descriptor, entry.graph.num_bytes)

    def clear(self) -> None:
        """Drop every graph. The weights that they read are about to change place."""
        for descriptor in list(self._entries):
            self.discard(self.runtime_mode, descriptor)

    def _capture(self, descriptor: BatchDescriptor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not self._backend.is_capturing_allowed:
            raise RuntimeError(
                f"{self.name} has no {describe_key((self.runtime_mode, descriptor))}, "
                "and capturing is not allowed now: batches must take captured graphs only"
            )
        inputs = describe_inputs(self._positional_names, args, kwargs) if self._checks_inputs else None
        started = time.perf_counter()
        graph, outputs = self._backend.capture(self._runnable, args, kwargs)
        seconds = time.perf_counter() - started
        counters = self._counters.record_capture(self.runtime_mode, descriptor, seconds, graph.num_bytes)
        self._entries[descriptor] = _Entry(graph, counters, inputs)
        return outputs

    def _check_inputs(
        self,
        captured: Mapping[str, InputLeaf],
        descriptor: BatchDescriptor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        current = describe_inputs(self._positional_names, args, kwargs)
        problem = find_mismatch(captured, current, with_addresses=self._checks_addresses)
        if problem is not None:
            raise RuntimeError(f"{describe_key((self.runtime_mode, descriptor))} of {self.name}: {problem}")
