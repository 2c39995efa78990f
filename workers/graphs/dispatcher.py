"""The dispatcher: which captured graph serves a batch.

Owns the keys that a mode and its capture sizes give, and which of them are captured so far. Knows nothing about
tensors: capturing and replaying is the wrapper's part, the order in time is the plan's.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterable
from typing import NamedTuple

from workers.errors import ConfigError
from workers.graphs.counters import GraphCounters
from workers.graphs.descriptor import BatchDescriptor, GraphKey
from workers.graphs.histogram import RecordsBatches
from workers.graphs.sizes import uniform_capture_sizes
from workers.modes import CUDAGraphMode


class FallbackReason(enum.StrEnum):
    """Why a batch ran without a graph."""

    GRAPHS_OFF = "graphs are off"
    MIXED_BATCH = "this mode runs mixed batches without graphs"
    ZERO_TOKENS = "the batch has no tokens"
    ABOVE_LARGEST = "the batch is above the largest capture size"
    NOT_CAPTURED = "no graph that fits is captured yet"
    DROPPED = "the graphs that fit were dropped"


class DispatchDecision(NamedTuple):
    """How one batch runs.

    Attributes:
        mode: Runtime mode: FULL, PIECEWISE or NONE.
        descriptor: Key of the graph, or the unpadded batch in mode NONE.
        fallback_reason: Set exactly in mode NONE.
    """

    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    fallback_reason: FallbackReason | None = None


class GraphDispatcher:
    """Chooses the runtime mode and the graph of each batch.

    FULL is preferred to PIECEWISE and PIECEWISE to NONE; within a mode the smallest captured graph that fits is
    taken, and the batch is padded to it. FULL keys carry the number of requests and PIECEWISE keys do not.

    Args:
        mode: A resolved mode (see ``resolve``).
        sizes: Capture sizes in tokens (see ``sizes``); may be empty in mode NONE only.
        max_num_seqs: Most requests in a step.
        query_len: Tokens that each request brings to a pure decode batch.
        counters: Counts what :meth:`dispatch` decides.
        traffic: Learns the batch sizes that :meth:`dispatch` sees.

    Raises:
        ConfigError: Graphs are on and ``sizes`` is empty.
    """

    def __init__(
        self,
        mode: CUDAGraphMode,
        sizes: Iterable[int],
        max_num_seqs: int,
        query_len: int = 1,
        *,
        counters: GraphCounters | None = None,
        traffic: RecordsBatches | None = None,
    ) -> None:
        self.mode = mode
        self.sizes = sorted(set(sizes))
        self.max_num_seqs = max_num_seqs
        self.query_len = query_len
        self.counters = counters
        self.traffic = traffic
        if mode is not CUDAGraphMode.NONE and not self.sizes:
            raise ConfigError(
                f"cudagraph_mode {mode.name} needs capture sizes; give cudagraph_capture_sizes or set it to NONE.",
                param="cudagraph_capture_sizes",
            )
        assert not self.sizes or self.sizes[0] >= 1
        self._uniform = _Family(CUDAGraphMode.FULL, self._uniform_keys())
        self._mixed = _Family(CUDAGraphMode.FULL, self._mixed_keys())
        self._piecewise = _Family(CUDAGraphMode.PIECEWISE, self._piecewise_keys())
        self._for_decode = [f for f in (self._uniform, self._mixed, self._piecewise) if f.keys]
        self._for_mixed = [f for f in (self._mixed, self._piecewise) if f.keys]
        self._decode_sizes: tuple[int, ...] | None = None

    def dispatch(
        self, num_reqs: int, num_tokens: int, uniform_query_len: int | None = None
    ) -> tuple[CUDAGraphMode, BatchDescriptor]:
        """The runtime mode of a batch and the graph that serves it, counted and added to the traffic.

        Args:
            num_reqs: Real requests.
            num_tokens: Real tokens.
            uniform_query_len: Tokens per request if every request brings the same number, else None.
        """
        decision = self.decide(num_reqs, num_tokens, uniform_query_len)
        if self.counters is not None:
            self.counters.record_batch(
                decision.mode, num_tokens, decision.descriptor.num_tokens, decision.fallback_reason
            )
        if self.traffic is not None and num_tokens > 0:
            self.traffic.record(num_reqs, num_tokens, is_decode=uniform_query_len == self.query_len)
        return decision.mode, decision.descriptor

    def decide(self, num_reqs: int, num_tokens: int, uniform_query_len: int | None = None) -> DispatchDecision:
        """What :meth:`dispatch` would choose, and why; changes nothing."""
        assert uniform_query_len is None or num_tokens == num_reqs * uniform_query_len
        is_decode = uniform_query_len == self.query_len
        families = self._for_decode if is_decode else self._for_mixed
        if num_tokens > 0:
            for family in families:
                descriptor = family.smallest_captured(num_reqs, num_tokens)
                if descriptor is not None:
                    return DispatchDecision(family.mode, descriptor)
        reason = self._fallback_reason(families, num_reqs, num_tokens, is_decode)
        return DispatchDecision(CUDAGraphMode.NONE, BatchDescriptor(num_tokens), reason)

    def capture_order(self) -> list[GraphKey]:
        """Every graph that can exist, captured ones included, largest first.

        Graphs share a memory pool, so whatever comes later fits in what the largest one has taken. At the same
        number of tokens full graphs, which hold more, come before piecewise ones.
        """
        keys = [(f.mode, d) for f in (self._uniform, self._mixed, self._piecewise) for d in f.keys]
        return sorted(keys, key=lambda key: (-key[1].num_tokens, key[0] is not CUDAGraphMode.FULL, key[1].uniform))

    def mark_captured(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """From now on batches may take this graph."""
        self._decode_sizes = None
        self._family_of(mode, descriptor).mark_captured(descriptor)

    def mark_dropped(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """This graph will not be captured (it failed, or does not fit in memory)."""
        self._decode_sizes = None
        self._family_of(mode, descriptor).mark_dropped(descriptor)

    def is_captured(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> bool:
        """Whether batches may take this graph."""
        return descriptor in self._family_of(mode, descriptor).captured

    def captured_keys(self) -> list[GraphKey]:
        """The graphs that batches may take, in :meth:`capture_order`."""
        return [key for key in self.capture_order() if self.is_captured(*key)]

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        """Sizes, ascending, that a pure decode batch can be padded to now."""
        if self._decode_sizes is None:
            tokens = {d.num_tokens for family in self._for_decode for d in family.captured}
            self._decode_sizes = tuple(sorted(tokens))
        return self._decode_sizes

    def clear(self) -> None:
        """Forget what is captured and what was dropped; the keys stay. For a weight reload."""
        self._decode_sizes = None
        for family in (self._uniform, self._mixed, self._piecewise):
            family.clear()

    def _uniform_keys(self) -> list[BatchDescriptor]:
        if self.mode.decode_mode() is not CUDAGraphMode.FULL:
            return []
        sizes = uniform_capture_sizes(self.sizes, self.max_num_seqs, self.query_len)
        return [BatchDescriptor(size, size // self.query_len, uniform=True) for size in sizes]

    def _mixed_keys(self) -> list[BatchDescriptor]:
        if self.mode.mixed_mode() is not CUDAGraphMode.FULL:
            return []
        return [BatchDescriptor(size, min(size, self.max_num_seqs)) for size in self.sizes]

    def _piecewise_keys(self) -> list[BatchDescriptor]:
        return [BatchDescriptor(size) for size in self.sizes] if self.mode.has_piecewise() else []

    def _family_of(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> _Family:
        for family in (self._uniform, self._mixed, self._piecewise):
            if family.mode is mode and descriptor in family.keys:
                return family
        raise AssertionError(f"{mode.name} {descriptor} is not a key of this dispatcher")

    def _fallback_reason(
        self, families: list[_Family], num_reqs: int, num_tokens: int, is_decode: bool
    ) -> FallbackReason:
        if self.mode is CUDAGraphMode.NONE:
            return FallbackReason.GRAPHS_OFF
        if num_tokens == 0:
            return FallbackReason.ZERO_TOKENS
        if not families and not is_decode:
            return FallbackReason.MIXED_BATCH
        fitting = [(f, d) for f in families for d in f.keys if _fits(d, num_reqs, num_tokens)]
        if not fitting:
            return FallbackReason.ABOVE_LARGEST
        is_dropped = all(descriptor in family.dropped for family, descriptor in fitting)
        return FallbackReason.DROPPED if is_dropped else FallbackReason.NOT_CAPTURED


class _Family:
    """The graphs of one kind, which differ in size only."""

    def __init__(self, mode: CUDAGraphMode, keys: list[BatchDescriptor]) -> None:
        self.mode = mode
        self.keys = keys
        self.clear()

    def clear(self) -> None:
        self.captured: set[BatchDescriptor] = set()
        self.dropped: set[BatchDescriptor] = set()
        self._index()

    def mark_captured(self, descriptor: BatchDescriptor) -> None:
        self.captured.add(descriptor)
        self.dropped.discard(descriptor)
        self._index()

    def mark_dropped(self, descriptor: BatchDescriptor) -> None:
        self.captured.discard(descriptor)
        self.dropped.add(descriptor)
        self._index()

    def smallest_captured(self, num_reqs: int, num_tokens: int) -> BatchDescriptor | None:
        for index in range(bisect.bisect_left(self._tokens, num_tokens), len(self._tokens)):
            descriptor = self._ascending[index]
            if _fits(descriptor, num_reqs, num_tokens):
                return descriptor
        return None

    def _index(self) -> None:
        self._ascending = [descriptor for descriptor in self.keys if descriptor in self.captured]
        self._tokens = [descriptor.num_tokens for descriptor in self._ascending]


def _fits(descriptor: BatchDescriptor, num_reqs: int, num_tokens: int) -> bool:
    has_rows = descriptor.num_reqs is None or num_reqs <= descriptor.num_reqs
    return has_rows and num_tokens <= descriptor.num_tokens
