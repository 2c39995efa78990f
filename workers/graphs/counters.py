"""Counters of the graph layer: what was captured, replayed, padded, and run without a graph.

One object per engine, written by its wrappers and its dispatcher on the engine's thread. Other threads may read:
every reader copies first. Knows nothing about tensors.
"""

from __future__ import annotations

import collections
import dataclasses

from workers.graphs.descriptor import BatchDescriptor, GraphKey
from workers.modes import CUDAGraphMode


@dataclasses.dataclass(slots=True)
class KeyCounters:
    """What happened to the graphs of one key; a PIECEWISE key has one graph per piece.

    Attributes:
        num_graphs: Graphs held now.
        num_captures: Captures since the start, those cleared since included.
        capture_seconds: Time spent in captures since the start.
        num_bytes: Memory that capturing the held graphs added to the pool.
        num_replays: Graph launches since the start.
    """

    num_graphs: int = 0
    num_captures: int = 0
    capture_seconds: float = 0.0
    num_bytes: int = 0
    num_replays: int = 0


class GraphCounters:
    """Counts captures and replays per key, and batches per runtime mode.

    Attributes:
        num_batches: Batches by runtime mode.
        num_tokens: Real tokens of those batches.
        num_padded_tokens: Padding added to them.
        fallbacks: Batches that ran without a graph, by reason.
        first_set_seconds: From the start of the first set of captures to its end, warm-up runs included.
        warm_up_seconds: Time spent in warm-up runs, on the host.
        first_warm_up_seconds: The first of them, which compiles kernels and makes library handles.
        num_busy_captures: Times that a running batch waited for the capture of one key.
        busy_capture_seconds: How long they waited in all.
        longest_busy_capture_s: The longest of these waits.
    """

    def __init__(self) -> None:
        self._by_key: dict[GraphKey, KeyCounters] = {}
        self.num_batches: collections.Counter[CUDAGraphMode] = collections.Counter()
        self.num_tokens = 0
        self.num_padded_tokens = 0
        self.fallbacks: collections.Counter[str] = collections.Counter()
        self.first_set_seconds = self.warm_up_seconds = self.first_warm_up_seconds = 0.0
        self.num_busy_captures = 0
        self.busy_capture_seconds = self.longest_busy_capture_s = 0.0

    def record_capture(
        self, mode: CUDAGraphMode, descriptor: BatchDescriptor, seconds: float, num_bytes: int
    ) -> KeyCounters:
        """One graph was captured; returns the key's own counters, for its wrapper to count replays in."""
        entry = self._entry(mode, descriptor)
        entry.num_graphs += 1
        entry.num_captures += 1
        entry.capture_seconds += seconds
        entry.num_bytes += num_bytes
        return entry

    def record_discard(self, mode: CUDAGraphMode, descriptor: BatchDescriptor, num_bytes: int) -> None:
        """One captured graph was given up, together with ``num_bytes`` that its capture had added."""
        entry = self._entry(mode, descriptor)
        entry.num_graphs -= 1
        entry.num_bytes -= num_bytes

    def record_batch(
        self, mode: CUDAGraphMode, num_tokens: int, num_tokens_padded: int, fallback_reason: str | None
    ) -> None:
        """One batch was dispatched."""
        self.num_batches[mode] += 1
        self.num_tokens += num_tokens
        self.num_padded_tokens += num_tokens_padded - num_tokens
        if fallback_reason is not None:
            self.fallbacks[str(fallback_reason)] += 1

    def record_warm_up(self, seconds: float) -> None:
        """One run in mode NONE before a capture."""
        self.first_warm_up_seconds = self.first_warm_up_seconds or seconds
        self.warm_up_seconds += seconds

    def record_busy_capture(self, seconds: float) -> None:
        """A running batch waited for a capture."""
        self.num_busy_captures += 1
        self.busy_capture_seconds += seconds
        self.longest_busy_capture_s = max(self.longest_busy_capture_s, seconds)

    def by_key(self) -> dict[GraphKey, KeyCounters]:
        """A copy of the counters per key."""
        return {key: dataclasses.replace(entry) for key, entry in list(self._by_key.items())}

    def num_graphs(self, mode: CUDAGraphMode | None = None) -> int:
        """Graphs held now, of one mode or of all."""
        return sum(e.num_graphs for (m, _), e in list(self._by_key.items()) if mode is None or m is mode)

    def num_replays(self, mode: CUDAGraphMode | None = None) -> int:
        """Graph launches, of one mode or of all."""
        return sum(e.num_replays for (m, _), e in list(self._by_key.items()) if mode is None or m is mode)

    def capture_seconds(self) -> float:
        """Time spent in captures since the start."""
        return sum(entry.capture_seconds for entry in list(self._by_key.values()))

    def _entry(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> KeyCounters:
        entry = self._by_key.get((mode, descriptor))
        if entry is None:
            entry = self._by_key[mode, descriptor] = KeyCounters()
        return entry
