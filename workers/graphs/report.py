"""The account of the graph layer: one snapshot of modes, graphs, memory, padding and fallbacks.

What ``warmgraph graphs show`` prints and the API's status returns. Knows how to gather the numbers from the
objects that own them, and nothing about printing or transport.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from workers.graphs.counters import GraphCounters, KeyCounters
from workers.graphs.descriptor import GraphKey
from workers.graphs.dispatcher import GraphDispatcher
from workers.graphs.memory import GraphMemoryBudget
from workers.graphs.plan import CapturePlan
from workers.graphs.resolve import ModeResolution


@dataclasses.dataclass(frozen=True, slots=True)
class GraphRow:
    """The graphs of one key.

    Attributes:
        mode: ``FULL`` or ``PIECEWISE``.
        state: ``captured``, ``pending`` or ``dropped``.
        num_graphs: Graphs held: one for FULL, one per piece for PIECEWISE.
        capture_seconds: Time spent capturing them.
        num_bytes: Memory their capture added to the pool.
        num_replays: Graph launches.
        dropped_because: Set if dropped.
    """

    mode: str
    num_tokens: int
    num_reqs: int | None
    uniform: bool
    state: str
    num_graphs: int
    capture_seconds: float
    num_bytes: int
    num_replays: int
    dropped_because: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class GraphReport:
    """A snapshot.

    Attributes:
        requested_mode: The user's mode.
        mode: The mode that runs.
        mode_reason: Why they differ, or None.
        backend: ``cuda`` or ``host``.
        is_ready: Whether the first set of graphs is captured.
        graphs: One row per key, largest first.
        captured: Graphs held, by mode.
        pending: Keys still to capture.
        sizes_from: Where the capture sizes come from, in words.
        capture_seconds: Time spent in captures since the start.
        warm_up_seconds: Time spent in the runs before captures, on the host.
        first_warm_up_seconds: The first of them, which compiles kernels and makes library handles.
        first_set_seconds: What the first set took, until the replica was ready; warm-up included.
        busy_captures: How many of them running batches waited for.
        busy_capture_seconds: How long the batches waited in all, warm-up included.
        longest_busy_capture_s: The longest wait.
        memory_bytes: Bytes that all graphs hold, as the backend measures.
        memory_limit_bytes: The limit, or None.
        skipped: What was left out for lack of memory, and why.
        replays: Graph launches by mode.
        batches: Batches by runtime mode, ``NONE`` included.
        tokens: Real tokens of those batches.
        padded_tokens: Padding added to them.
        eager_fallbacks: Batches that ran without a graph, by reason.
    """

    requested_mode: str
    mode: str
    mode_reason: str | None
    backend: str
    query_len: int
    capture_sizes: list[int]
    sizes_from: str
    is_ready: bool
    graphs: list[GraphRow]
    captured: dict[str, int]
    pending: int
    capture_seconds: float
    warm_up_seconds: float
    first_warm_up_seconds: float
    first_set_seconds: float
    busy_captures: int
    busy_capture_seconds: float
    longest_busy_capture_s: float
    memory_bytes: int
    memory_limit_bytes: int | None
    skipped: list[str]
    replays: dict[str, int]
    batches: dict[str, int]
    tokens: int
    padded_tokens: int
    eager_fallbacks: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return dataclasses.asdict(self)


def make_report(
    resolution: ModeResolution,
    dispatcher: GraphDispatcher,
    counters: GraphCounters,
    plan: CapturePlan,
    budget: GraphMemoryBudget,
    *,
    backend_name: str,
    bytes_held: int,
    sizes_from: str,
) -> GraphReport:
    """Gather a snapshot; ``bytes_held`` is the backend's own measure of all graphs, ``sizes_from`` is for people."""
    by_key = counters.by_key()
    rows = [_row(key, by_key.get(key, KeyCounters()), dispatcher, plan) for key in dispatcher.capture_order()]
    modes = sorted({row.mode for row in rows})
    return GraphReport(
        requested_mode=resolution.requested.name,
        mode=resolution.mode.name,
        mode_reason=resolution.reason,
        backend=backend_name,
        query_len=dispatcher.query_len,
        capture_sizes=list(dispatcher.sizes),
        sizes_from=sizes_from,
        is_ready=plan.is_ready,
        graphs=rows,
        captured={mode: sum(row.num_graphs for row in rows if row.mode == mode) for mode in modes},
        pending=len(plan.pending),
        capture_seconds=counters.capture_seconds(),
        warm_up_seconds=counters.warm_up_seconds,
        first_warm_up_seconds=counters.first_warm_up_seconds,
        first_set_seconds=counters.first_set_seconds,
        busy_captures=counters.num_busy_captures,
        busy_capture_seconds=counters.busy_capture_seconds,
        longest_busy_capture_s=counters.longest_busy_capture_s,
        memory_bytes=bytes_held,
        memory_limit_bytes=budget.limit_bytes,
        skipped=[skipped.reason for skipped in list(budget.skipped)],
        replays={mode: sum(row.num_replays for row in rows if row.mode == mode) for mode in modes},
        batches={mode.name: count for mode, count in dict(counters.num_batches).items()},
        tokens=counters.num_tokens,
        padded_tokens=counters.num_padded_tokens,
        eager_fallbacks=dict(counters.fallbacks),
    )


def _row(key: GraphKey, entry: KeyCounters, dispatcher: GraphDispatcher, plan: CapturePlan) -> GraphRow:
    mode, descriptor = key
    dropped = dict(plan.dropped)
    return GraphRow(
        mode=mode.name,
        num_tokens=descriptor.num_tokens,
        num_reqs=descriptor.num_reqs,
        uniform=descriptor.uniform,
        state="dropped" if key in dropped else "captured" if dispatcher.is_captured(mode, descriptor) else "pending",
        num_graphs=entry.num_graphs,
        capture_seconds=entry.capture_seconds,
        num_bytes=entry.num_bytes,
        num_replays=entry.num_replays,
        dropped_because=dropped.get(key),
    )


def summary_line(report: GraphReport) -> str:
    """One line for the log once the replica is ready."""
    held = ", ".join(f"{count} {mode}" for mode, count in report.captured.items()) or "none"
    return (
        f"graphs: mode {report.mode}, captured {held} in {report.capture_seconds:.2f} s, "
        f"{report.memory_bytes / (1 << 20):.1f} MiB, {report.pending} pending"
    )
