"""Verdicts, predictions and first fixes, from made-up measurements whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from workers.analysis.diagnosis import (
    Comparison,
    Limit,
    StepMeasurement,
    StepWork,
    find_crossover,
    first_fix,
    judge,
)
from workers.config import EngineConfig


def step(**fields: Any) -> StepMeasurement:
    work = StepWork(1e9, 1e9, fields.pop("memory_us", 500.0), fields.pop("compute_us", 10.0))
    defaults = {
        "batch": 1,
        "step_us": 1000.0,
        "kernels": 200.0,
        "launches": 20.0,
        "busy_us": 900.0,
        "kernel_us": 4.5,
        "launch_us": 8.0,
        "runs_as": "FULL",
        "work": work,
    }
    return StepMeasurement(**(defaults | fields))


def test_many_launches_and_an_idle_device_are_launch_bound() -> None:
    assert judge(step(step_us=2400.0, launches=300.0, busy_us=900.0), "cuda") is Limit.LAUNCH


def test_a_busy_device_is_bound_by_what_takes_longer() -> None:
    assert judge(step(), "cuda") is Limit.MEMORY
    assert judge(step(compute_us=800.0), "cuda") is Limit.COMPUTE


def test_an_idle_device_without_launches_waits_for_the_host() -> None:
    assert judge(step(busy_us=300.0), "cuda") is Limit.HOST


def test_on_a_cpu_dispatch_counts_when_it_is_a_share_of_the_step() -> None:
    assert judge(step(launches=100.0, launch_us=5.0), "cpu") is Limit.LAUNCH
    assert judge(step(launches=20.0, launch_us=5.0), "cpu") is Limit.MEMORY


BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def gpu(batch: int, launching_us: float) -> Comparison:
    """A device whose work is linear in the batch, and a host that launches meanwhile."""
    work_us = 1000.0 + 5.0 * batch
    return Comparison(batch, max(launching_us, work_us), work_us)


@pytest.mark.parametrize("launching_us", [1500.0, 2200.0, 3000.0])
def test_a_gpus_crossover_is_predicted_from_small_batches(launching_us: float) -> None:
    crossover = find_crossover([gpu(batch, launching_us) for batch in BATCHES], launches_overlap=True)
    assert crossover.fitted == [1, 2, 4, 8, 16]
    assert crossover.predicted is not None
    assert crossover.measured is not None
    truth = (launching_us / 1.1 - 1000.0) / 5.0
    assert crossover.predicted == pytest.approx(truth, abs=1.5)
    assert 0.5 < crossover.predicted / crossover.measured < 2


def test_kernels_of_one_rows_own_do_not_bend_the_prediction() -> None:
    """Llama-8B on an H100: a single row is faster than the line of all others."""
    single_us = (6296, 9990, 11836, 10083, 10029, 9487, 10778, 11346, 10727)
    replayed_us = (5722, 6133, 6170, 6218, 6364, 6569, 6893, 7728, 10337)
    rows = [Comparison(*row) for row in zip(BATCHES[:9], single_us, replayed_us, strict=True)]
    crossover = find_crossover(rows, launches_overlap=True)
    assert crossover.measured == pytest.approx(232, abs=2)
    assert crossover.predicted == pytest.approx(166, abs=2)


def test_a_cpus_launches_add_to_the_work() -> None:
    rows = [Comparison(batch, 5.0 + 20.0 + 2.0 * batch, 20.0 + 2.0 * batch) for batch in (1, 2, 4, 8, 16, 32)]
    crossover = find_crossover(rows, launches_overlap=False)
    assert crossover.predicted == pytest.approx((50.0 - 20.0) / 2.0, abs=1)
    assert crossover.measured is not None
    assert 0.5 < crossover.predicted / crossover.measured < 2


def test_graphs_that_never_stop_mattering_are_not_given_a_batch() -> None:
    crossover = find_crossover([Comparison(batch, 10.0, 1.0) for batch in (1, 2, 4)], launches_overlap=True)
    assert (crossover.predicted, crossover.measured, crossover.largest) == (None, None, 4)


def test_graphs_that_never_matter_stop_at_the_first_batch() -> None:
    crossover = find_crossover([Comparison(batch, 1.0, 1.0) for batch in (1, 2, 4)], launches_overlap=True)
    assert (crossover.predicted, crossover.measured) == (1, 1)


def config(**fields: Any) -> EngineConfig:
    return EngineConfig.create(model="m", max_num_seqs=256, **fields)


LAUNCH_BOUND = {"step_us": 2400.0, "launches": 300.0, "runs_as": "NONE"}


@pytest.mark.parametrize(
    ("fields", "measured", "key", "value"),
    [
        ({"enforce_eager": True}, LAUNCH_BOUND, "enforce_eager", False),
        (
            {"compilation_config": {"cudagraph_mode": "NONE"}},
            LAUNCH_BOUND,
            "compilation_config.cudagraph_mode",
            "FULL_AND_PIECEWISE",
        ),
        (
            {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
            LAUNCH_BOUND | {"runs_as": "PIECEWISE"},
            "compilation_config.cudagraph_mode",
            "FULL_AND_PIECEWISE",
        ),
        ({}, LAUNCH_BOUND | {"batch": 100}, "compilation_config.max_cudagraph_capture_size", 100),
        ({}, {"batch": 256}, "max_num_seqs", 512),
        ({}, {"batch": 8}, None, None),
        ({"dtype": "float32"}, {}, "dtype", "bfloat16"),
        ({"compilation_config": {"mode": "NONE"}}, {}, "compilation_config.mode", "VLLM_COMPILE"),
        ({}, {"busy_us": 300.0}, None, None),
    ],
)
def test_the_first_fix_names_the_setting(
    fields: dict[str, Any], measured: dict[str, Any], key: str | None, value: Any
) -> None:
    fix = first_fix(config(**fields), "cuda", [step(**measured)])
    assert (fix.key, fix.value) == (key, value)
    assert fix.why.endswith(".")


def test_on_a_cpu_the_native_program_is_the_fix_for_dispatch() -> None:
    dispatching = step(launches=200.0, launch_us=5.0, runs_as="NONE")
    assert first_fix(config(enforce_eager=True), "cpu", [dispatching]).key == "enforce_eager"
    assert "does not run as a recorded native program" in first_fix(config(), "cpu", [dispatching]).why
