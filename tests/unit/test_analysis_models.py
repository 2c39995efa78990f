"""The models of launch overhead: padding, launches, crossover. The numbers are those of the textbook examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.analysis.crossover import StepCosts, analyze_crossover, unit_costs
from workers.analysis.launches import Segment, count_launches, synthetic_segments
from workers.analysis.load import read_load, uniform_load
from workers.analysis.padding import analyze_padding
from workers.errors import ConfigError
from workers.graphs.histogram import BatchHistogram


def test_padding_needs_half_the_captures() -> None:
    report = analyze_padding(uniform_load(8), [1, 2, 4, 8])
    assert (report.captures_with_padding, report.captures_without_padding) == (4, 8)
    by_size = {row.size: row.graph_size for row in report.rows}
    assert by_size[5] == by_size[7] == 8
    assert report.padded_share == pytest.approx(7 / 43)
    assert report.graphless_share == 0


def test_batches_above_the_largest_size_run_without_a_graph() -> None:
    report = analyze_padding({3: 1, 9: 3}, [4])
    assert [row.graph_size for row in report.rows] == [4, None]
    assert report.graphless_share == pytest.approx(0.75)
    assert (report.captures_with_padding, report.captures_without_padding) == (1, 1)


@given(st.dictionaries(st.integers(1, 64), st.integers(1, 100), min_size=1), st.sets(st.integers(1, 64), min_size=1))
def test_padding_never_needs_more_captures(load: dict[int, int], sizes: set[int]) -> None:
    report = analyze_padding(load, sorted(sizes))
    assert report.captures_with_padding <= min(report.captures_without_padding, len(sizes))
    assert 0 <= report.padded_share < 1
    for row in report.rows:
        assert row.graph_size is None or row.graph_size >= row.size
        assert row.graph_size is not None or row.size > max(sizes)


def test_a_histogram_and_a_trace_give_their_batches(tmp_path: Path) -> None:
    histogram = BatchHistogram()
    histogram.record(5, 5, is_decode=True)
    histogram.record(2, 40, is_decode=False)
    (tmp_path / "histogram.json").write_text(histogram.to_json())
    assert read_load(tmp_path / "histogram.json") == {5: 1, 40: 1}
    (tmp_path / "trace.jsonl").write_text('{"num_tokens": 5}\n\n{"num_tokens": 40, "count": 3}\n{"num_tokens": 5}\n')
    assert read_load(tmp_path / "trace.jsonl") == {5: 2, 40: 3}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no batches"),
        ("5\n", "line 1: a line is an object"),
        ('{"num_tokens": 5}\nfive\n', "line 2: not JSON"),
        ('{"num_tokens": 0}\n', "num_tokens must be a whole number of at least 1"),
        ('{"num_tokens": 1, "count": 1.5}\n', "count must be a whole number"),
        ('{"num_tokens": true}\n', "num_tokens must be a whole number"),
        ('{"num_tokens": 1, "size": 1}\n', "unknown key 'size'"),
    ],
)
def test_a_wrong_trace_is_refused_by_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_load(tmp_path / "trace.jsonl")


def test_a_damaged_histogram_is_refused(tmp_path: Path) -> None:
    histogram = BatchHistogram()
    histogram.record(5, 5, is_decode=True)
    document = json.loads(histogram.to_json())
    document["decode"]["5"] = 7
    (tmp_path / "histogram.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="checksum does not match"):
        read_load(tmp_path / "histogram.json")


def test_ten_ops_split_at_the_fifth() -> None:
    segments = synthetic_segments(10, [5])
    assert [(segment.num_ops, segment.is_captured) for segment in segments] == [(5, True), (1, False), (4, True)]
    counts = count_launches(segments)
    assert (counts.eager, counts.piecewise, counts.full) == (10, 3, 1)


def test_eager_segments_pay_per_op() -> None:
    counts = count_launches([Segment("piece", 100, True), Segment("attention", 3, False), Segment("piece", 50, True)])
    assert (counts.eager, counts.piecewise, counts.full) == (153, 5, 1)


@given(st.integers(1, 50), st.sets(st.integers(0, 49)))
def test_segments_hold_every_op_once(num_ops: int, splits: set[int]) -> None:
    inside = sorted(split for split in splits if split < num_ops)
    segments = synthetic_segments(num_ops, inside)
    assert sum(segment.num_ops for segment in segments) == num_ops
    assert sum(not segment.is_captured for segment in segments) == len(inside)
    counts = count_launches(segments)
    assert counts.full <= counts.piecewise <= counts.eager == num_ops


@pytest.mark.parametrize(("num_ops", "split"), [(0, []), (10, [10]), (10, [-1])])
def test_impossible_synthetic_models_are_refused(num_ops: int, split: list[int]) -> None:
    with pytest.raises(ConfigError):
        synthetic_segments(num_ops, split)


@pytest.mark.parametrize(
    ("num_ops", "capture", "steps"),
    [(1, 1, None), (1, 5, None), (4, 4, 2), (4, 20, 7), (32, 32, 2), (32, 160, 6), (300, 300, 2), (300, 1500, 6)],
)
def test_crossover_in_units_of_a_launch(num_ops: int, capture: int, steps: int | None) -> None:
    costs = {cost.capture: cost for cost in unit_costs([num_ops])}
    row = analyze_crossover(costs[capture])
    assert row.steps_to_pay_off == steps
    assert row.asymptotic_speedup == num_ops
    assert ("never pays" in row.explanation) == (steps is None)


@given(st.floats(1, 1e4), st.floats(1, 1e4), st.floats(0, 1e6))
def test_a_capture_has_paid_at_the_step_named_and_not_before(eager: float, replay: float, capture: float) -> None:
    row = analyze_crossover(StepCosts(10, eager, replay, capture, "us"))
    steps = row.steps_to_pay_off
    if steps is None:
        assert replay >= eager
        return
    slack = 1e-9 * (capture + steps * eager)
    assert capture + steps * replay <= steps * eager + slack
    assert steps == 1 or capture + (steps - 1) * replay > (steps - 1) * eager - slack
