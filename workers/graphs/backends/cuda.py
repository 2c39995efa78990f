"""CUDA graphs, recorded with the raw capture calls.

``torch.cuda.graph`` synchronises the device and empties the allocator's cache at every capture; with hundreds of
captures that is most of their time. Here it happens once per series. All graphs share one pool and are captured
on one side stream.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from workers.graphs.backends.base import CapturedGraph, GraphBackend, call_checked
from workers.graphs.backends.weak_ref import weak_ref_tensor
from workers.graphs.trees import map_tensors

logger = logging.getLogger(__name__)

#: Only the capturing thread is held to what a capture allows; others go on copying, allocating and waiting.
CAPTURE_ERROR_MODE = "thread_local"

# Graphs whose capture broke half-way. PyTorch's allocators may still ask them whether they are capturing.
_broken: list[torch.cuda.CUDAGraph] = []


class _Pool:
    """A pool of PyTorch's allocators and the graphs recorded into it."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.is_fresh = True
        self.num_bytes = 0
        self.graphs: weakref.WeakSet[CapturedGraph] = weakref.WeakSet()

    @property
    def is_freed(self) -> bool:
        """Whether the last graph is gone: the allocators then free the pool and may refuse to record into it again."""
        return not self.is_fresh and not self.graphs


class CudaGraphBackend(GraphBackend):
    """Records and replays graphs of one CUDA device.

    The outputs of a capturing call are allocated but not computed: capture with made-up inputs, and replay for
    results. Before a capture, run the callable once inside :meth:`capturing` so that kernels are compiled and
    library handles exist.
    """

    name: ClassVar[str] = "cuda"
    checks_shapes: ClassVar[bool] = False
    freezes_context: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        assert device.type == "cuda"
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # PyTorch's own gap
        self._pool = _Pool()
        self._retired: list[_Pool] = []

    def bytes_held(self) -> int:
        """Memory that captures added to the pool, and to earlier pools whose graphs are still in use, in bytes."""
        return self._pool.num_bytes + sum(pool.num_bytes for pool in self._retired if pool.graphs)

    def _capture(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[CapturedGraph, Any]:
        if self._pool.is_freed:
            self._pool = _Pool()
        pool = self._pool
        reserved_before = _reserved_bytes(self._device)
        graph = self._begin(pool)
        try:
            outputs = call_checked(function, args, kwargs)
        except BaseException:
            self._abandon(graph)
            raise
        try:
            graph.capture_end()
        except BaseException:
            self._retire_pool(graph)
            raise
        num_bytes = max(0, _reserved_bytes(self._device) - reserved_before)
        captured = _CudaGraph(graph, map_tensors(outputs, weak_ref_tensor), num_bytes)
        pool.num_bytes += num_bytes
        pool.graphs.add(captured)
        return captured, outputs

    def _begin(self, pool: _Pool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool.is_fresh = False
        try:
            graph.capture_begin(pool=pool.handle, capture_error_mode=CAPTURE_ERROR_MODE)
        except BaseException:
            # One of the two allocators, of device and of pinned memory, may think that a capture is under way.
            self._retire_pool(graph)
            raise
        return graph

    @contextlib.contextmanager
    def _capture_scope(self, clean_up: bool) -> Iterator[None]:
        with torch.cuda.device(self._device):
            # Steps and made-up batches write the same host buffers, which the device reads later: each waits until
            # the other's are read.
            torch.cuda.current_stream().synchronize()
            if clean_up:
                torch.cuda.empty_cache()
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                self._stream.synchronize()

    def _release_pool(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self._pool = _Pool()
        self._retired.clear()

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Leave capture mode after the callable raised."""
        try:
            graph.capture_end()
        except RuntimeError as error:
            # The error to report is the callable's; this one is its consequence.
            logger.warning("a capture was invalidated: %s", error)
            self._retire_pool(graph)
        else:
            graph.reset()

    def _retire_pool(self, graph: torch.cuda.CUDAGraph) -> None:
        """Go on with a new pool after a capture broke; graphs captured earlier keep the old one alive.

        PyTorch 2.11 leaves both its allocators believing that the capture goes on: the one of the device is told here,
        the one of pinned memory cannot be told, goes on asking ``graph``, and refuses to record into that pool again.
        Later versions tell both and let ``reset`` release the pool.
        """
        broken = self._pool
        self._retired = [pool for pool in (*self._retired, broken) if pool.graphs]
        self._pool = _Pool()
        try:
            torch._C._cuda_endAllocateToPool(self._device.index, broken.handle)
        except RuntimeError:  # it was told
            graph.reset()
        else:
            torch._C._cuda_releasePool(self._device.index, broken.handle)
            _broken.append(graph)


class _CudaGraph(CapturedGraph):
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any, num_bytes: int) -> None:
        self._graph = graph
        self.outputs = outputs
        self.num_bytes = num_bytes

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()


def _reserved_bytes(device: torch.device) -> int:
    # memory_reserved() flattens the whole statistics in Python, ten times slower than this.
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    return int(stats["reserved_bytes"]["all"]["current"])
