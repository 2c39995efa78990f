"""The seam between graph wrappers and what records graphs: capture, replay, bytes held.

Owns what is the same for every backend: captures happen only inside :meth:`GraphBackend.capturing`, one at a time
per process, with the garbage collector off. Knows nothing about why or in which order graphs are captured.
"""

from __future__ import annotations

import abc
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, final

from workers.graphs.descriptor import BatchDescriptor
from workers.graphs.trees import check_outputs
from workers.modes import CUDAGraphMode

# CUDA allows several captures at a time, PyTorch's allocator does not.
_capture_lock = threading.Lock()
_capturing_thread: int | None = None


class HoldsGraphs(Protocol):
    """Whatever keeps graphs of a backend, so that the backend can ask for them to be dropped."""

    def clear(self) -> None:
        """Drop every graph."""

    def discard(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """Drop the graph of this key, if there is one."""


class CapturedGraph(abc.ABC):
    """One recording.

    Attributes:
        outputs: What the callable returned at capture, at fixed addresses. Held weakly: the memory belongs to the
            backend's pool, is written by each :meth:`replay`, and may be shared with other graphs of the pool, so
            it is valid until the next replay or capture of another one.
        num_bytes: Memory that this capture added to the pool.
    """

    outputs: Any
    num_bytes: int

    @abc.abstractmethod
    def replay(self) -> None:
        """Run the recorded work: read the captured inputs' memory, write the captured outputs'."""


class GraphBackend(abc.ABC):
    """Records and replays graphs of one device; its graphs share one memory pool."""

    name: ClassVar[str]

    #: Whether every replay compares the shapes of its inputs with the captured ones. Where it would cost launch
    #: time, ``debug_graph_inputs`` does.
    checks_shapes: ClassVar[bool]

    #: Whether a replay uses the forward context (attention metadata) of its capture. Where it does not, attention
    #: backends may be captured whatever they declare.
    freezes_context: ClassVar[bool]

    def __init__(self) -> None:
        self._is_capturing_allowed = False
        self._holders: weakref.WeakSet[HoldsGraphs] = weakref.WeakSet()
        self._graphs: weakref.WeakSet[CapturedGraph] = weakref.WeakSet()

    @property
    def is_capturing_allowed(self) -> bool:
        """Whether a ``with backend.capturing()`` block is open."""
        return self._is_capturing_allowed

    @final
    @contextlib.contextmanager
    def capturing(self, *, clean_up: bool = True) -> Iterator[None]:
        """Allow captures inside the ``with`` block, on the backend's own stream where it has streams.

        Warm-up runs belong in the block too, so that they see the same stream as the captures.

        Args:
            clean_up: Collect young garbage and return cached memory to the device once, before the first capture.
                False for a capture in a gap, which should be short.
        """
        assert not self._is_capturing_allowed, "capturing() is already open"
        if clean_up:
            # A full collection looks at every object of the process, half a second with a compiler loaded, and what
            # old garbage holds is not lost: the device's allocator reuses it.
            gc.collect(1)
        was_gc_enabled = gc.isenabled()
        # A collection in the middle of a capture may free CUDA objects, which breaks it.
        gc.disable()
        self._is_capturing_allowed = True
        try:
            with self._capture_scope(clean_up):
                yield
        finally:
            self._is_capturing_allowed = False
            if was_gc_enabled:
                gc.enable()

    @final
    def capture(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[CapturedGraph, Any]:
        """Record one call of ``function``.

        Returns:
            The graph, and the call's outputs as owners of their memory: while they live, later captures do not
            reuse it.

        Raises:
            RuntimeError: Capturing is not allowed now, or another capture is running in this thread.
            TypeError: ``function`` returned something other than tensors and constants in tuples, lists and dicts.
            Exception: Whatever ``function`` raises; the backend stays usable.
        """
        if not self._is_capturing_allowed:
            raise RuntimeError("a graph can be captured only inside 'with backend.capturing()'")
        with _one_capture():
            graph, outputs = self._capture(function, args, kwargs)
        self._graphs.add(graph)
        return graph, outputs

    def register(self, holder: HoldsGraphs) -> None:
        """Have ``holder`` asked by :meth:`clear` and :meth:`discard`; held weakly."""
        self._holders.add(holder)

    def clear(self) -> None:
        """Drop every graph of every registered holder, and the pool's memory. For a weight reload."""
        assert not self._is_capturing_allowed, "graphs cannot be cleared while capturing"
        for holder in list(self._holders):
            holder.clear()
        self._release_pool()

    def discard(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """Drop the graphs of one key of every registered holder.

        The pool keeps their memory for later captures, unless no graph is left in it.
        """
        for holder in list(self._holders):
            holder.discard(mode, descriptor)
        if not self._graphs and self.bytes_held() > 0:
            self._release_pool()

    @abc.abstractmethod
    def bytes_held(self) -> int:
        """Memory of the pool, in bytes."""

    @abc.abstractmethod
    def _capture(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[CapturedGraph, Any]:
        """Record one call, and leave the backend usable if it raises."""

    @abc.abstractmethod
    def _capture_scope(self, clean_up: bool) -> contextlib.AbstractContextManager[None]:
        """What has to surround a series of captures."""

    @abc.abstractmethod
    def _release_pool(self) -> None:
        """Return the pool's memory; no graph is left."""


def call_checked(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call ``function`` and refuse outputs that a graph cannot keep."""
    outputs = function(*args, **kwargs)
    check_outputs(outputs)
    return outputs


@contextlib.contextmanager
def _one_capture() -> Iterator[None]:
    global _capturing_thread
    me = threading.get_ident()
    if _capturing_thread == me:
        raise RuntimeError("a graph cannot be captured inside the capture of another one")
    with _capture_lock:
        _capturing_thread = me
        try:
            yield
        finally:
            _capturing_thread = None
