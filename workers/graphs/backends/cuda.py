"""CUDA graphs, recorded with the raw capture calls.

``torch.cuda.graph`` synchronises the device and empties the allocator's cache at every capture; with hundreds of
captures that is most of their time. Here it happens once per series. All graphs share one pool and are captured
on one side stream.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from workers.graphs.backends.base import CapturedGraph, GraphBackend, call_checked
from workers.graphs.backends.weak_ref import weak_ref_tensor
from workers.graphs.trees import map_tensors

logger = logging.getLogger(__name__)

#: Only the capturing thread is held to what a capture allows; others go on copying, allocating and waiting.
CAPTURE_ERROR_MODE = "thread_local"

# Graphs whose capture broke half-way. PyTorch's allocator may still ask them whether they are capturing.
_broken: list[torch.cuda.CUDAGraph] = []


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
        self._pool = torch.cuda.graph_pool_handle()
        self._bytes_held = 0

    def bytes_held(self) -> int:
        """Memory that captures added to the pool, in bytes."""
        return self._bytes_held

    def _capture(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[CapturedGraph, Any]:
        reserved_before = _reserved_bytes(self._device)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode=CAPTURE_ERROR_MODE)
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
        self._bytes_held += num_bytes
        return _CudaGraph(graph, map_tensors(outputs, weak_ref_tensor), num_bytes), outputs

    @contextlib.contextmanager
    def _capture_scope(self, clean_up: bool) -> Iterator[None]:
        with torch.cuda.device(self._device):
            if clean_up:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            outer = torch.cuda.current_stream()
            self._stream.wait_stream(outer)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                outer.wait_stream(self._stream)

    def _release_pool(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()
        self._bytes_held = 0

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
        """Go on with a new pool after ``capture_end`` failed.

        It then returns before it tells the allocator that the capture is over, and the allocator refuses to record
        into that pool again. Graphs captured earlier keep the old pool alive.
        """
        _broken.append(graph)
        with contextlib.suppress(RuntimeError):  # raised if the failure came after the allocator was told
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()


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
