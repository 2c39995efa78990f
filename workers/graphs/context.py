"""The forward context: what a compiled or captured model needs to know about the step it runs in.

A captured graph and a compiled piece cannot take attention metadata as arguments without baking its shapes in,
so the attention op reads it from here. There is one writer, :func:`set_forward_context`, and it is a ``with``
block that restores the previous context even after an exception. Knows nothing about models or schedulers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from workers.graphs.descriptor import BatchDescriptor
from workers.modes import CUDAGraphMode

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, slots=True)
class LastRows:
    """Of a step in which nothing but each request's last token is read of the model's result.

    Whatever follows the last attention is then computed for those rows alone, by forms of the model that can
    (:func:`keep_last_rows`). llama.cpp does the same, calling them output ids.

    Attributes:
        find_rows: Gives the int32 rows of those tokens, in the order of the requests.
        attn_metadata: The backend's metadata for the last layer.
    """

    find_rows: Callable[[], torch.Tensor]
    attn_metadata: Any


@dataclasses.dataclass(slots=True)
class ForwardContext:
    """State of one forward pass.

    Attributes:
        attn_backend: The attention backend (``workers.attention.base.AttentionBackend``) that runs the op.
        attn_metadata: That backend's metadata for this batch, or None in a profiling run, in which attention
            writes zeros and touches no cache.
        kv_caches: KV cache per layer, indexed by the op's ``layer`` argument.
        cudagraph_runtime_mode: How this batch runs; graph wrappers of another mode run their callable eagerly.
            NONE in profiling and warm-up runs.
        batch_descriptor: The graph that serves this batch; None only in mode NONE.
        last_rows: What suffices of this step; None for all of it. Graphs hold whole batches, so only in mode NONE.
    """

    attn_backend: Any
    attn_metadata: Any
    kv_caches: Sequence[torch.Tensor]
    cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE
    batch_descriptor: BatchDescriptor | None = None
    last_rows: LastRows | None = None

    def __post_init__(self) -> None:
        mode = self.cudagraph_runtime_mode
        assert mode.is_valid_runtime_mode(), f"{mode.name} is not a runtime mode"
        assert mode is CUDAGraphMode.NONE or self.batch_descriptor is not None, "a graph needs a batch descriptor"
        assert mode is CUDAGraphMode.NONE or self.last_rows is None, "a graph holds the whole batch"

    def metadata_of(self, layer: int) -> Any:
        """The attention backend's metadata for one layer."""
        if self.last_rows is not None and layer == len(self.kv_caches) - 1:
            return self.last_rows.attn_metadata
        return self.attn_metadata


_current: ForwardContext | None = None


@contextlib.contextmanager
def set_forward_context(context: ForwardContext) -> Iterator[ForwardContext]:
    """Make ``context`` current inside the ``with`` block."""
    global _current
    previous = _current
    _current = context
    try:
        yield context
    finally:
        _current = previous


def get_forward_context() -> ForwardContext:
    """The current context; asserts that a ``with set_forward_context(...)`` block is open."""
    assert _current is not None, "no forward context: call the model inside set_forward_context()"
    return _current


def keep_last_rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a forward pass goes on with after its last attention, if it goes on row by row.

    Args:
        tensors: ``[T, ...]`` each.

    Returns:
        ``[R, ...]`` each if the context says that these rows suffice, else the same tensors.
    """
    if _current is None or _current.last_rows is None:
        return tensors
    rows_R = _current.last_rows.find_rows()
    return tuple(tensor.index_select(0, rows_R) for tensor in tensors)


def is_forward_context_available() -> bool:
    """Whether a ``with set_forward_context(...)`` block is open."""
    return _current is not None
