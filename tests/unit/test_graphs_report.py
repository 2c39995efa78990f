"""Counters and the report."""

from __future__ import annotations

import json

from workers.graphs import (
    AttentionCGSupport,
    BatchDescriptor,
    CapturePlan,
    CompilationMode,
    CUDAGraphMode,
    GraphCounters,
    GraphDispatcher,
    GraphKey,
    GraphMemoryBudget,
    make_report,
    resolve_mode_with_reason,
)
from workers.graphs.counters import KeyCounters
from workers.graphs.report import summary_line

M = CUDAGraphMode


def test_counters_per_key_and_mode() -> None:
    counters = GraphCounters()
    piece = BatchDescriptor(8)
    for _ in range(3):
        held = counters.record_capture(M.PIECEWISE, piece, 0.5, 100)
    counters.record_capture(M.FULL, BatchDescriptor(8, 8, True), 1.0, 7)
    held.num_replays += 1
    counters.record_discard(M.PIECEWISE, piece, 100)
    entry = counters.by_key()[M.PIECEWISE, piece]
    assert (entry.num_graphs, entry.num_captures, entry.num_bytes, entry.num_replays) == (2, 3, 200, 1)
    assert counters.num_graphs() == 3
    assert counters.num_graphs(M.FULL) == 1
    assert counters.num_replays(M.PIECEWISE) == counters.num_replays() == 1
    assert counters.capture_seconds() == 2.5
    entry.num_graphs = 99  # a copy
    assert counters.num_graphs() == 3


def test_report_is_plain_and_complete() -> None:
    resolution = resolve_mode_with_reason(M.FULL, CompilationMode.VLLM_COMPILE, AttentionCGSupport.UNIFORM_BATCH, True)
    counters = GraphCounters()
    dispatcher = GraphDispatcher(resolution.mode, [1, 2, 4], 2, counters=counters)
    plan = CapturePlan(dispatcher.capture_order(), 2, first_sizes=[1, 2])
    budget = GraphMemoryBudget(1000)
    held: dict[GraphKey, KeyCounters] = {}
    for index in range(3):
        key = plan.next_capture(idle=False)
        assert key is not None
        if index == 2:
            plan.drop(key, "it failed")
            dispatcher.mark_dropped(*key)
            continue
        held[key] = counters.record_capture(*key, seconds=0.25, num_bytes=10)
        plan.mark_captured(key)
        dispatcher.mark_captured(*key)
    held[M.FULL, BatchDescriptor(2, 2, True)].num_replays += 1
    dispatcher.dispatch(1, 1, 1)
    dispatcher.dispatch(2, 9, None)
    counters.record_warm_up(1.0)
    counters.record_warm_up(0.5)
    counters.first_set_seconds = 3.0
    counters.record_busy_capture(0.25)
    counters.record_busy_capture(0.125)
    report = make_report(
        resolution, dispatcher, counters, plan, budget, backend_name="host", bytes_held=20, sizes_from="the config"
    )
    plain = json.loads(json.dumps(report.to_dict()))
    rows = {(row["mode"], row["num_tokens"]): row for row in plain.pop("graphs")}
    assert list(rows) == [("PIECEWISE", 4), ("FULL", 2), ("PIECEWISE", 2), ("FULL", 1), ("PIECEWISE", 1)]
    assert {key: row["state"] for key, row in rows.items()} == {
        ("PIECEWISE", 4): "pending",
        ("FULL", 2): "captured",
        ("PIECEWISE", 2): "captured",
        ("FULL", 1): "dropped",
        ("PIECEWISE", 1): "pending",
    }
    assert rows["FULL", 1]["dropped_because"] == "it failed"
    assert rows["FULL", 2] == {
        "mode": "FULL",
        "num_tokens": 2,
        "num_reqs": 2,
        "uniform": True,
        "state": "captured",
        "num_graphs": 1,
        "capture_seconds": 0.25,
        "num_bytes": 10,
        "num_replays": 1,
        "dropped_because": None,
    }
    reason = plain.pop("mode_reason")
    assert reason.startswith("cudagraph_mode FULL becomes FULL_AND_PIECEWISE")
    assert plain == {
        "requested_mode": "FULL",
        "mode": "FULL_AND_PIECEWISE",
        "backend": "host",
        "query_len": 1,
        "capture_sizes": [1, 2, 4],
        "sizes_from": "the config",
        "is_ready": False,
        "captured": {"FULL": 1, "PIECEWISE": 1},
        "pending": 2,
        "capture_seconds": 0.5,
        "warm_up_seconds": 1.5,
        "first_warm_up_seconds": 1.0,
        "first_set_seconds": 3.0,
        "busy_captures": 2,
        "busy_capture_seconds": 0.375,
        "longest_busy_capture_s": 0.25,
        "memory_bytes": 20,
        "memory_limit_bytes": 1000,
        "skipped": [],
        "replays": {"FULL": 1, "PIECEWISE": 0},
        "batches": {"FULL": 1, "NONE": 1},
        "tokens": 10,
        "padded_tokens": 1,
        "eager_fallbacks": {"the batch is above the largest capture size": 1},
    }
    expected = "graphs: mode FULL_AND_PIECEWISE, captured 1 FULL, 1 PIECEWISE in 0.50 s, 0.0 MiB, 2 pending"
    assert summary_line(report) == expected
