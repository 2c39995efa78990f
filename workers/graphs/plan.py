"""The capture plan: which graph is captured next, and when the replica may report ready.

Pure bookkeeping over the dispatcher's keys. The engine's loop asks for one graph at a time, when it is idle or between
two steps, captures it and reports back, so a running batch never waits for more than one capture. Knows nothing about
tensors or about what a capture does.
"""

from __future__ import annotations

import bisect
import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from workers.graphs.descriptor import GraphKey, describe_key
from workers.graphs.histogram import BatchHistogram
from workers.modes import CUDAGraphMode

FirstSizes = Sequence[int] | Literal["all"] | None


class CapturePlan:
    """Hands out captures one at a time: the first set at once, the rest in idle gaps.

    The first set is captured largest first, since graphs share a pool. The rest follows the traffic: next is the
    graph that saves the most padding (or eager batches) for the batches in ``histogram``, as it stands when asked.
    What no traffic asks for comes last, largest first.

    Args:
        order: Every graph to capture (``GraphDispatcher.capture_order()``).
        max_num_seqs: Most requests in a step.
        query_len: Tokens that each request brings to a pure decode batch.
        first_sizes: Sizes of the first set, in requests for uniform graphs and in tokens for the others; each is
            served by the smallest graph that holds it, or by the largest there is. By default the powers of two up
            to ``max_num_seqs`` and ``max_num_seqs`` itself, which serve every decode batch by padding, and the largest
            of each kind, in whose memory all later ones fit. ``"all"`` captures everything before the replica is
            ready, an empty list nothing.
        histogram: The batches run so far; read at every idle :meth:`next_capture`.
    """

    def __init__(
        self,
        order: Iterable[GraphKey],
        max_num_seqs: int,
        query_len: int = 1,
        *,
        first_sizes: FirstSizes = None,
        histogram: BatchHistogram | None = None,
    ) -> None:
        self._order = list(order)
        self._query_len = query_len
        self._histogram = histogram
        self._families = _families(self._order)
        if first_sizes == "all":
            self.first = list(self._order)
        else:
            if first_sizes is None:
                first_sizes = [*default_first_sizes(max_num_seqs), *(key[1].num_tokens for key in self._order[:1])]
            self.first = _covering(self._order, self._families, [int(size) for size in first_sizes], query_len)
        self.reset()

    def reset(self) -> None:
        """Start over, after captured graphs were cleared for a weight reload."""
        self._pending = dict.fromkeys(self._order)
        self._captured: set[GraphKey] = set()
        self._in_flight: GraphKey | None = None
        self.dropped: dict[GraphKey, str] = {}

    @property
    def is_ready(self) -> bool:
        """Whether the first set is done, so that the replica may report ready."""
        return not any(key in self._pending for key in self.first)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to capture."""
        return not self._pending

    @property
    def pending(self) -> list[GraphKey]:
        """What is left to capture, largest first."""
        return list(self._pending)

    def next_capture(self, idle: bool) -> GraphKey | None:
        """The graph to capture now, or None.

        Until :attr:`is_ready` there is always one; afterwards only when the engine is idle. Report every graph
        handed out with :meth:`mark_captured` or :meth:`drop` before asking again.
        """
        assert self._in_flight is None, f"the {describe_key(self._in_flight)} is still being captured"
        for key in self.first:
            if key in self._pending:
                self._in_flight = key
                return key
        if not idle or not self._pending:
            return None
        self._in_flight = max(self._pending, key=self._savings_by_key().__getitem__)
        return self._in_flight

    def next_needed(self) -> GraphKey | None:
        """For a busy engine: the graph that saves most for the batches run so far; None if none would save anything."""
        assert self._in_flight is None, f"the {describe_key(self._in_flight)} is still being captured"
        savings = self._savings_by_key()
        key = max(self._pending, key=savings.__getitem__, default=None)
        self._in_flight = key if key is not None and savings[key] > 0 else None
        return self._in_flight

    def mark_captured(self, key: GraphKey) -> None:
        """The graph is captured."""
        self._take(key)
        self._captured.add(key)

    def drop(self, key: GraphKey, reason: str) -> None:
        """The graph will not be captured: it failed, or does not fit in memory."""
        self._take(key)
        self.dropped[key] = reason

    def _take(self, key: GraphKey) -> None:
        assert key in self._pending, f"the {describe_key(key)} is not waiting to be captured"
        del self._pending[key]
        if self._in_flight == key:
            self._in_flight = None

    def _savings_by_key(self) -> collections.Counter[GraphKey]:
        """What each pending graph would save; max() over the pending ones keeps the first of equals, the largest."""
        savings: collections.Counter[GraphKey] = collections.Counter()
        if self._histogram is not None:
            for family, counts in self._traffic(self._histogram):
                savings.update(self._savings(family, counts))
        return savings

    def _traffic(self, histogram: BatchHistogram) -> list[tuple[list[GraphKey], Mapping[int, int]]]:
        """The families of graphs with the batches, by tokens, that each would serve."""
        decode = {num_reqs * self._query_len: count for num_reqs, count in list(histogram.decode.items())}
        uniform, others = self._families
        if uniform:
            return [(uniform, decode), *((family, histogram.mixed) for family in others)]
        return [(family, histogram.token_counts(self._query_len)) for family in others]

    def _savings(self, family: list[GraphKey], counts: Mapping[int, int]) -> dict[GraphKey, int]:
        """Padded tokens that each pending graph of a family would save; an eager batch counts as twice the largest."""
        largest = family[-1][1].num_tokens
        sizes = sorted(size for size in counts if size <= largest)
        batches = [0, *itertools.accumulate(counts[size] for size in sizes)]
        captured = [descriptor.num_tokens for mode, descriptor in family if (mode, descriptor) in self._captured]
        captured = [0, *captured, 2 * largest]
        savings = {}
        for key in family:
            if key in self._pending:
                num_tokens = key[1].num_tokens
                above = bisect.bisect_left(captured, num_tokens)
                # It would serve the batches that the next larger captured graph serves now, up to its own size.
                first, last = (bisect.bisect_right(sizes, size) for size in (captured[above - 1], num_tokens))
                savings[key] = (captured[above] - num_tokens) * (batches[last] - batches[first])
        return savings


def default_first_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two up to ``max_num_seqs``, and ``max_num_seqs``."""
    return sorted({1 << exponent for exponent in range(max_num_seqs.bit_length())} | {max_num_seqs})


_Families = tuple[list[GraphKey], list[list[GraphKey]]]


def _families(order: Iterable[GraphKey]) -> _Families:
    """Keys that differ in size only, ascending: the uniform ones, then each other mode's."""
    uniform: list[GraphKey] = []
    others: dict[CUDAGraphMode, list[GraphKey]] = {}
    for mode, descriptor in sorted(order, key=lambda key: key[1].num_tokens):
        family = uniform if descriptor.uniform else others.setdefault(mode, [])
        family.append((mode, descriptor))
    return uniform, list(others.values())


def _covering(order: Sequence[GraphKey], families: _Families, targets: Sequence[int], query_len: int) -> list[GraphKey]:
    """Per family, the smallest key that holds each target, else the largest; in the order of ``order``."""
    uniform, others = families
    chosen: set[GraphKey] = set()
    for family, unit in [(uniform, query_len), *((family, 1) for family in others)]:
        sizes = [descriptor.num_tokens for _, descriptor in family]
        for target in targets:
            if family:
                chosen.add(family[min(bisect.bisect_left(sizes, target * unit), len(family) - 1)])
    return [key for key in order if key in chosen]
