"""Autoscaling as pure logic: what tokens cost, what comes in, how many replicas that takes."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaling.arrivals import ArrivalMeter
from cluster.autoscaling.load import ModelLoad, ReplicaLoad
from cluster.autoscaling.policy import ScalingGoals, by_work, load_scaling_policy
from cluster.autoscaling.replica_meter import ReplicaMeter
from cluster.autoscaling.step_cost import StepCost
from cluster.messages import IngressLoad
from workers.engine.stats import EngineStats
from workers.errors import ConfigError
from workers.scheduler.output import SchedulerStats

GOALS = ScalingGoals(queue_target_s=2.0, utilization=0.8)


class Time:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def replica(ingress: IngressLoad | None = None, **changes: float) -> ReplicaLoad:
    """A replica that makes 100 tokens per second, prompt or output."""
    fields = {
        "num_requests": 0.0, "prompt_tokens": 0.0, "output_tokens": 0.0, "prompt_token_s": 0.01, "output_token_s": 0.01,
        "efficiency": 0.0, "start_s": 3.0,
    }  # fmt: skip
    return ReplicaLoad(**{**fields, **changes}, ingress=ingress or IngressLoad())


def wanted(num_replicas: int = 1, start_s: float = 3.0, num_target: int = 0, **ingress: float) -> int:
    """What the policy says to busy replicas and this load at the ingress."""
    load = IngressLoad(**ingress)
    busy = [replica(load, num_requests=4.0, output_tokens=100.0) for _ in range(num_replicas)]
    return by_work(ModelLoad(num_replicas, num_target or num_replicas, busy, start_s), GOALS)


def test_what_keeps_up_stays() -> None:
    assert wanted(1, output_tokens_per_s=70) == 1
    assert wanted(2, output_tokens_per_s=150) == 2


def test_steady_load_gets_as_many_as_it_takes() -> None:
    assert wanted(1, output_tokens_per_s=81) == 2
    assert wanted(1, output_tokens_per_s=200, prompt_tokens_per_s=190) == 5


def test_shrinking_needs_more_room_than_growing() -> None:
    assert wanted(2, output_tokens_per_s=75) == 2
    assert wanted(2, output_tokens_per_s=60) == 1


def test_a_queue_gets_what_works_it_off_once_it_is_ready() -> None:
    queue = {"num_held": 10, "held_output_tokens": 700}
    assert wanted(1, start_s=0.0, **queue) == 4  # 8 s of work in 2 s
    assert wanted(1, start_s=4.0, **queue) == 2  # 4 s are left by then
    assert wanted(1, start_s=8.0, **queue) == 1  # it is gone by then
    assert wanted(1, start_s=8.0, output_tokens_per_s=100, **queue) == 4  # but not if as much comes in


def test_a_queue_that_does_not_shrink_gets_one_more_replica() -> None:
    crowd = IngressLoad(num_held=5, held_output_tokens=50, output_tokens_per_s=10)
    load = ModelLoad(2, 2, [replica(crowd, num_requests=4.0)] * 2, 3.0)
    assert by_work(load, GOALS) == 2, "the average of what comes in is low yet"
    assert by_work(dataclasses.replace(load, growth_tokens_per_s=0.0), GOALS) == 3
    assert by_work(dataclasses.replace(load, growth_tokens_per_s=900.0), GOALS) == 3
    assert by_work(dataclasses.replace(load, growth_tokens_per_s=-100.0), GOALS) == 2, "it is worked off"
    starting = dataclasses.replace(load, growth_tokens_per_s=0.0, num_target=3)
    assert by_work(starting, GOALS) == 3, "one is on its way"


def test_full_replicas_that_wait_for_something_else_make_tokens_dearer() -> None:
    crowd = IngressLoad(num_held=5, output_tokens_per_s=50)
    load = ModelLoad(1, 1, [replica(crowd, num_requests=4.0)], 3.0)
    assert by_work(load, GOALS) == 1
    assert by_work(dataclasses.replace(load, efficiency=0.5), GOALS) == 2


def test_starting_replicas_are_not_given_up_while_requests_wait() -> None:
    assert wanted(1, num_target=3, num_held=1, held_output_tokens=10) == 3
    assert wanted(1, num_target=3, output_tokens_per_s=10) == 1


def test_running_requests_alone_are_no_queue() -> None:
    assert wanted(1, num_held=0, held_output_tokens=0, output_tokens_per_s=10) == 1


def test_an_idle_model_needs_nobody_and_a_starting_one_is_left_alone() -> None:
    assert by_work(ModelLoad(2, 2, [replica(), replica()], 3.0), GOALS) == 0
    just_now = IngressLoad(output_tokens_per_s=100, has_arrivals=1)
    assert by_work(ModelLoad(2, 2, [replica(), replica(just_now)], 3.0), GOALS) == 2
    assert by_work(ModelLoad(0, 0, [], 3.0), GOALS) == 0
    new = replica(IngressLoad(num_held=3), output_token_s=0.0, prompt_token_s=0.0)
    assert by_work(ModelLoad(1, 2, [new], 3.0), GOALS) == 2, "it may be what a decision is waiting for"


def test_a_replica_that_has_not_reported_is_not_taken_away() -> None:
    busy = replica(IngressLoad(output_tokens_per_s=10), num_requests=1.0)
    assert by_work(ModelLoad(3, 3, [busy], 3.0), GOALS) == 3
    assert by_work(ModelLoad(3, 3, [busy] * 3, 3.0), GOALS) == 1


@settings(deadline=None)
@given(
    st.integers(1, 8),
    st.floats(0, 60),
    st.floats(0, 2000),
    st.floats(0, 5000),
    st.integers(0, 50),
    st.floats(0, 1000),
)
def test_more_load_never_takes_fewer(
    num_replicas: int, start_s: float, rate: float, held_tokens: float, num_held: int, more: float
) -> None:
    def want(extra: float) -> int:
        return wanted(
            num_replicas,
            start_s,
            num_held=num_held,
            held_output_tokens=held_tokens if num_held else 0.0,
            output_tokens_per_s=rate + extra,
        )

    assert 1 <= want(0.0) <= want(more)


@settings(deadline=None)
@given(st.floats(0.001, 0.1), st.floats(1e-6, 1e-3), st.integers(1, 10**6))
def test_the_line_through_steps_is_found(fixed_s: float, per_token_s: float, seed: int) -> None:
    rng, cost = random.Random(seed), StepCost()
    for _ in range(300):
        num_tokens = rng.choice([1, 8, 16, 100, 512])
        cost.add(num_tokens, fixed_s + per_token_s * num_tokens)
    fixed, slope = cost.line()
    assert fixed == pytest.approx(fixed_s, rel=0.02)
    assert slope == pytest.approx(per_token_s, rel=0.02)
    prompt_s, output_s = cost.token_s(16)
    assert prompt_s == slope
    assert output_s == pytest.approx(slope + fixed / 16)


def test_steps_of_one_size_count_as_fixed_and_none_as_unknown() -> None:
    cost = StepCost()
    assert cost.token_s(8) == (0.0, 0.0)
    for _ in range(10):
        cost.add(4, 0.02)
    assert cost.line() == (pytest.approx(0.02), 0.0)
    assert cost.token_s(8) == (pytest.approx(0.0025), pytest.approx(0.0025))
    cost.add(40, 0.2, num_steps=10)  # ten steps in one report
    assert cost.line()[0] == pytest.approx(0.02)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 512), st.floats(1e-4, 1.0)), min_size=1, max_size=50))
def test_costs_are_never_negative(steps: list[tuple[int, float]]) -> None:
    cost = StepCost()
    for num_tokens, seconds in steps:
        cost.add(num_tokens, seconds)
    assert all(value >= -1e-12 for value in (*cost.line(), *cost.token_s(8)))


def test_arrivals_learn_how_much_is_really_generated() -> None:
    time = Time()
    meter = ArrivalMeter(time)
    for _ in range(100):
        time.now_s += 0.5
        meter.arrive(10, 1000)
        meter.finish(1000, 100)
    load = meter.load(num_held=2, held_prompt_tokens=20, held_output_tokens=2000)
    assert load.prompt_tokens_per_s == pytest.approx(20, rel=0.1)
    assert load.output_ratio == pytest.approx(0.1, abs=0.02)
    assert load.has_arrivals == 1
    assert load.output_tokens_per_s == pytest.approx(200, rel=0.3)
    assert load.held_output_tokens == pytest.approx(200, rel=0.2)
    time.now_s += 500
    assert meter.load(0, 0, 0) == IngressLoad(output_ratio=load.output_ratio)


def engine_stats(**changes: Any) -> EngineStats:
    scheduler = SchedulerStats(2, 1, 5, 10, 30, 40, 60, 4, 0, 0, 0)
    return dataclasses.replace(EngineStats(scheduler, 0, 0, 0, 0, 0, 0, 0.0, (), True), **changes)


def test_a_replica_reports_what_it_measured_and_was_told() -> None:
    time = Time()
    meter = ReplicaMeter(time, engine_stats(), max_num_seqs=4, start_s=7.0)
    time.now_s += 1.0
    meter.note_step(engine_stats(num_steps=10, num_computed_tokens=20, num_generated_tokens=20, busy_seconds=0.4))
    meter.note_ingress("a", IngressLoad(num_held=3, held_prompt_tokens=30))
    meter.note_ingress("b", IngressLoad(num_held=1, output_tokens_per_s=5, output_ratio=0.5, has_arrivals=1))
    load = meter.load()
    assert load.ingress == IngressLoad(4, 30, 0, 0, 5, 0.75, 1)
    assert (load.num_requests, load.prompt_tokens, load.output_tokens, load.start_s) == (3, 30, 40, 7.0)
    assert load.output_token_s == pytest.approx(0.01)
    assert ReplicaLoad.from_metrics(load.to_metrics()) == load
    assert ReplicaLoad.from_metrics({"num_requests": 1.0}) is None
    assert all(isinstance(value, int | float) for value in load.to_metrics().values())
    time.now_s += 10
    assert meter.load().ingress == IngressLoad()


def test_efficiency_is_measured_while_a_replica_is_full() -> None:
    time = Time()
    meter = ReplicaMeter(time, engine_stats(), max_num_seqs=4, start_s=7.0)
    counts = {"num_steps": 0, "num_computed_tokens": 0, "num_generated_tokens": 0, "busy_seconds": 0.0}

    def step(pause_s: float, num_running: int) -> float:
        """One step of 10 ms of 4 tokens after a pause; what the replica then says."""
        time.now_s += 0.01 + pause_s
        changes = zip(counts, (1, 4, 4, 0.01), strict=True)
        counts.update({name: counts[name] + change for name, change in changes})
        scheduler = dataclasses.replace(engine_stats().scheduler, num_running=num_running, num_waiting=0)
        meter.note_step(engine_stats(scheduler=scheduler, **counts))
        return meter.load().efficiency

    assert step(100.0, 4) == 0, "nothing is known of a replica that was never full"
    for _ in range(100):
        efficiency = step(0.01, 4)
    assert efficiency == pytest.approx(0.5, rel=0.05)
    step(0.01, 3)
    assert step(100.0, 4) == pytest.approx(0.5, rel=0.05), "it was not full meanwhile"


def test_a_policy_that_is_not_there_is_named() -> None:
    assert load_scaling_policy("cluster.autoscaling.policy:by_work") is by_work
    with pytest.raises(ConfigError, match=r"'no\.where:x' is none of by_work"):
        load_scaling_policy("no.where:x")
