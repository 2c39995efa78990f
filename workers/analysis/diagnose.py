"""Runs decode steps of a config, with and without what launches them in one call, and gathers what a diagnosis needs.

Two engines are held side by side: one launches op by op, the other the same ops as a graph (on a CPU: as the recorded
native program). One of them is the config as it stands. What the numbers mean is ``diagnosis``'s part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from workers.analysis.costs import DeviceRates, describe_device, measure_rates
from workers.analysis.diagnosis import (
    Comparison,
    Crossover,
    Fix,
    Limit,
    StepMeasurement,
    StepWork,
    find_crossover,
    first_fix,
    judge,
)
from workers.analysis.profile import WorkProfile, profile_work
from workers.analysis.session import DecodeSession, analysis_config
from workers.analysis.work import ModelWork
from workers.config import EngineConfig
from workers.modes import CUDAGraphMode
from workers.runner.device import resolve_device

#: Rounds in which the two engines take turns. The fastest counts: other work on the host only ever slows a step down.
_ROUNDS = {"cuda": 5, "cpu": 10}

#: Seconds of one engine's round, and its most steps, by kind of device.
_ROUND_S = {"cuda": 0.1, "cpu": 0.1}
_MAX_ROUND_STEPS = {"cuda": 50, "cpu": 4}

_PROFILED_STEPS = 4

#: Prompt tokens of each request unless the caller names a number; a CPU takes long for prompts.
DEFAULT_CONTEXT = {"cuda": 128, "cpu": 16}


@dataclasses.dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        device: For people.
        is_replayed: Whether the config as it stands is the one that launches all at once.
        single: Name of what launches op by op.
        replayed: Name of what launches all at once.
        steps: The config as it stands, by batch size.
        limits: What limits each of them.
        launch_us: What one launch (one dispatch) costs the host in this engine.
    """

    device: str
    device_type: str
    context: int
    rates: DeviceRates
    launch_us: float
    is_replayed: bool
    single: str
    replayed: str
    steps: list[StepMeasurement]
    limits: list[Limit]
    comparisons: list[Comparison]
    crossover: Crossover
    fix: Fix

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class _Sample:
    """Both engines at one batch size."""

    batch: int
    single_us: float
    replayed_us: float
    single: WorkProfile
    replayed: WorkProfile
    runs_as: str
    context: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Pair:
    """The changes to the config that make each engine; ``{}`` is the config as it stands."""

    single: dict[str, Any]
    replayed: dict[str, Any]
    names: tuple[str, str]

    @property
    def is_replayed(self) -> bool:
        return not self.replayed


def default_batches(config: EngineConfig) -> list[int]:
    """Powers of two up to ``max_num_seqs``, and that itself."""
    powers = [1 << n for n in range(config.max_num_seqs.bit_length())]
    return sorted({*powers, config.max_num_seqs})


def diagnose(
    config: EngineConfig,
    batches: Sequence[int],
    context: int | None = None,
    *,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Diagnosis:
    """Measure the config at every batch size and say what limits it.

    Args:
        batches: At least two batch sizes.
        context: Prompt tokens of each request.
        on_progress: Told what happens next.

    Raises:
        ConfigError: The config does not allow these batches.
    """
    device = resolve_device(config.device)
    context = context or DEFAULT_CONTEXT[device.type]
    pair = _pair(config, device.type)
    num_steps = (_ROUNDS[device.type] + 1) * _MAX_ROUND_STEPS[device.type] + _PROFILED_STEPS
    with ExitStack() as stack:
        sessions = []
        for changes, name in zip((pair.single, pair.replayed), pair.names, strict=True):
            on_progress(f"loading: {name}")
            sessions.append(DecodeSession(analysis_config(config, batches, context, num_steps, **changes), context))
            stack.callback(sessions[-1].close)
        on_progress("measuring the device")
        rates = measure_rates(device, sessions[0].engine.runner.model.dtype)
        work = ModelWork.of(sessions[0].engine)
        samples = []
        for batch in sorted(batches):
            on_progress(f"measuring: batch {batch}")
            samples.append(_measure(sessions, batch, num_steps, is_replayed=pair.is_replayed))
    for sample in samples:
        least_s = min(sample.single_us, sample.replayed_us) / 1e6
        rates = rates.at_least(*_work_of(work, sample), least_s)
    launch_us = _launch_us(samples[0], rates, device)
    steps = [_step(sample, pair.is_replayed, launch_us, device, _step_work(work, sample, rates)) for sample in samples]
    comparisons = [Comparison(sample.batch, sample.single_us, sample.replayed_us) for sample in samples]
    return Diagnosis(
        device=describe_device(device),
        device_type=device.type,
        context=context,
        rates=rates,
        launch_us=launch_us,
        is_replayed=pair.is_replayed,
        single=pair.names[0],
        replayed=pair.names[1],
        steps=steps,
        limits=[judge(step, device.type) for step in steps],
        comparisons=comparisons,
        crossover=find_crossover(comparisons, launches_overlap=device.type == "cuda"),
        fix=first_fix(config, device.type, steps),
    )


def _pair(config: EngineConfig, device_type: str) -> _Pair:
    """What to compare: on CUDA, graphs off and on; on a CPU, the recorded native program off and on."""
    if device_type == "cpu":
        names = ("ops one by one (enforce_eager)", "the whole step in one call (native program)")
        if config.enforce_eager:
            return _Pair({}, {"enforce_eager": False}, names)
        return _Pair({"enforce_eager": True}, {}, names)
    names = ("kernels launched one by one", "captured graphs")
    if config.enforce_eager:
        graphs = {"mode": "NONE", "cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY.name}
        return _Pair({}, {"enforce_eager": False, "compilation_config": graphs}, names)
    if config.compilation_config.cudagraph_mode is CUDAGraphMode.NONE:
        graphs = {"cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE.name}
        return _Pair({}, {"compilation_config": graphs}, names)
    return _Pair({"compilation_config": {"cudagraph_mode": CUDAGraphMode.NONE.name}}, {}, names)


def _measure(sessions: Sequence[DecodeSession], batch: int, num_steps: int, *, is_replayed: bool) -> _Sample:
    device = sessions[0].device
    configured = sessions[is_replayed]
    before = configured.mode_counts()
    with ExitStack() as stack:
        for session in sessions:
            stack.enter_context(session.holding(batch, num_steps))
        rounds = [_round_steps(session) for session in sessions]
        times: list[list[float]] = [[], []]
        for _ in range(_ROUNDS[device.type]):
            for session, steps, samples in zip(sessions, rounds, times, strict=True):
                samples.append(session.steps(steps) * 1e6)
        single, replayed = (
            profile_work(lambda session=session: session.steps(_PROFILED_STEPS), _PROFILED_STEPS, device)  # type: ignore[misc]
            for session in sessions
        )
        runs = configured.mode_counts() - before
        context = configured.mean_context()
    return _Sample(batch, min(times[0]), min(times[1]), single, replayed, runs.most_common(1)[0][0], context)


def _round_steps(session: DecodeSession) -> int:
    kind = session.device.type
    seconds = session.steps(2)
    return max(2, min(_MAX_ROUND_STEPS[kind], int(_ROUND_S[kind] / seconds)))


def _launch_us(smallest: _Sample, rates: DeviceRates, device: torch.device) -> float:
    """What one launch costs in this engine; where the comparison does not show it, what a tiny op costs.

    On CUDA a step that launches kernel by kernel and leaves the device idle takes as long as its launches. On a CPU
    the difference between both engines is what dispatching costs.
    """
    if device.type == "cuda":
        if smallest.single.busy_us < smallest.single_us / 1.25:
            return smallest.single_us / smallest.single.launches
        return rates.launch_us
    fewer = smallest.single.launches - smallest.replayed.launches
    saved_us = smallest.single_us - smallest.replayed_us
    if fewer > 0 and saved_us > 0:
        return saved_us / fewer
    return rates.launch_us


def _work_of(work: ModelWork, sample: _Sample) -> tuple[float, float]:
    """Bytes and operations of a step."""
    return work.num_bytes(sample.batch, sample.context), work.flops(sample.batch, sample.context)


def _step_work(work: ModelWork, sample: _Sample, rates: DeviceRates) -> StepWork:
    num_bytes, flops = _work_of(work, sample)
    return StepWork(num_bytes, flops, num_bytes / rates.bandwidth * 1e6, flops / rates.matmul_flops * 1e6)


def _step(
    sample: _Sample, is_replayed: bool, launch_us: float, device: torch.device, work: StepWork
) -> StepMeasurement:
    step_us = sample.replayed_us if is_replayed else sample.single_us
    profiled = sample.replayed if is_replayed else sample.single
    if device.type == "cuda":
        kernels, busy_us, kernel_us = profiled.kernels, profiled.busy_us, profiled.kernel_us
    else:
        # The program's ops are the model's, only the profiler cannot see them.
        kernels = sample.single.kernels
        busy_us = max(0.0, step_us - profiled.launches * launch_us)
        kernel_us = busy_us / kernels
    return StepMeasurement(
        batch=sample.batch,
        step_us=step_us,
        kernels=kernels,
        launches=profiled.launches,
        busy_us=busy_us,
        kernel_us=kernel_us,
        launch_us=launch_us,
        runs_as=sample.runs_as,
        work=work,
    )
