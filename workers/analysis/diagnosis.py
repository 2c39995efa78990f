"""From measured decode steps to a verdict, a prediction and a first fix.

Pure functions over numbers: what limits a step, at which batch graphs stop mattering, which setting to change.
Knows nothing about how the numbers were measured, and no torch.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from workers.config import EngineConfig
from workers.modes import CompilationMode, CUDAGraphMode

#: Graphs have stopped mattering where they speed a step up by less than this.
MATTERS = 1.10

#: Below this busy share a device waits more than any kernel explains.
_IDLE_SHARE = 0.6

#: On a CPU the dispatch of ops does not overlap with their work; above this share of a step it is what to mend first.
_DISPATCH_SHARE = 0.25

_LARGEST_BATCH = 1 << 16


class Limit(enum.StrEnum):
    """What a step waits for."""

    LAUNCH = "launch-bound"
    HOST = "host-bound"
    MEMORY = "memory-bound"
    COMPUTE = "compute-bound"


@dataclasses.dataclass(frozen=True, slots=True)
class StepWork:
    """What one decode step must do, and the time it takes at least.

    Attributes:
        num_bytes: Every weight once and every live KV entry once.
        flops: Multiplications and additions.
        memory_us: ``num_bytes`` at the measured bandwidth.
        compute_us: ``flops`` at the measured rate of a large matrix product.
    """

    num_bytes: float
    flops: float
    memory_us: float
    compute_us: float

    @property
    def floor_us(self) -> float:
        """No step can be faster."""
        return max(self.memory_us, self.compute_us)


@dataclasses.dataclass(frozen=True, slots=True)
class StepMeasurement:
    """One batch size, as the config runs it.

    Attributes:
        step_us: One decode step, unprofiled.
        kernels: Kernels per step. On a CPU: ops that Python dispatched.
        launches: Launches of kernels and graphs by the host per step. On a CPU: as ``kernels``.
        busy_us: Time per step in which the device ran anything. On a CPU: what dispatching leaves.
        kernel_us: Mean duration of a kernel.
        launch_us: Cost of one launch (one dispatch) to the host.
        runs_as: Runtime mode of the graph layer.
    """

    batch: int
    step_us: float
    kernels: float
    launches: float
    busy_us: float
    kernel_us: float
    launch_us: float
    runs_as: str
    work: StepWork

    @property
    def busy_share(self) -> float:
        """Of the step."""
        return min(1.0, self.busy_us / self.step_us)

    @property
    def launching_us(self) -> float:
        """What the launches of a step cost the host."""
        return self.launches * self.launch_us


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """A step op by op and a step in one call, at one batch size, measured in turns.

    Attributes:
        single_us: Every op launched by itself.
        replayed_us: The same ops as a graph (on a CPU, as the recorded native program where there is one).
    """

    batch: int
    single_us: float
    replayed_us: float

    @property
    def speedup(self) -> float:
        """What launching all at once gains."""
        return self.single_us / self.replayed_us


@dataclasses.dataclass(frozen=True, slots=True)
class Crossover:
    """The batch size at which graphs stop mattering.

    Attributes:
        predicted: From the smaller batches; None: at no batch size up to 65,536.
        measured: Interpolated between measured batches; None: not up to ``largest``.
        fitted: The batches that the prediction saw.
        largest: The largest batch measured.
    """

    predicted: int | None
    measured: int | None
    fitted: list[int]
    largest: int


@dataclasses.dataclass(frozen=True, slots=True)
class Fix:
    """What to change first.

    Attributes:
        key: Path below ``engine``, or None if no setting helps.
        value: For the key.
        why: One sentence.
    """

    key: str | None
    value: Any
    why: str


def judge(step: StepMeasurement, device_type: str) -> Limit:
    """What limits a step."""
    if device_type == "cuda":
        if step.launching_us >= step.busy_us:
            return Limit.LAUNCH
        if step.busy_share < _IDLE_SHARE:
            return Limit.HOST
    elif step.launching_us >= _DISPATCH_SHARE * step.step_us:
        return Limit.LAUNCH
    return Limit.MEMORY if step.work.memory_us >= step.work.compute_us else Limit.COMPUTE


def fitted_batches(batches: Sequence[int]) -> list[int]:
    """The smaller half of the batches, from which a prediction is made; the rest tests it."""
    ordered = sorted(batches)
    return ordered[: max(2, (len(ordered) + 1) // 2)]


def find_crossover(comparisons: Sequence[Comparison], *, launches_overlap: bool) -> Crossover:
    """Predict from the smaller batches where graphs stop mattering, and find it among all of them.

    Where launches overlap with the device's work (CUDA) a step without graphs takes the longer of both; where they do
    not (a CPU) it takes their sum. A step of any batch has the same launches, so their cost is taken as constant; the
    work is a line through the smaller batches.

    Args:
        comparisons: At least two batch sizes.
    """
    rows = sorted(comparisons, key=lambda row: row.batch)
    known = rows[: len(fitted_batches([row.batch for row in rows]))]
    predicted = None
    # Rows in which graphs no longer matter say nothing of what launching costs.
    telling = [row for row in known if row.speedup > MATTERS] or known[:1]
    work = _line([(row.batch, row.replayed_us) for row in known])
    launching_us = statistics.median(row.single_us - (0 if launches_overlap else row.replayed_us) for row in telling)
    for batch in range(rows[0].batch, _LARGEST_BATCH + 1):
        device_us = work(batch)
        single_us = max(launching_us, device_us) if launches_overlap else launching_us + device_us
        if single_us <= MATTERS * device_us:
            predicted = batch
            break
    return Crossover(predicted, _measured_crossover(rows), [row.batch for row in known], rows[-1].batch)


def first_fix(config: EngineConfig, device_type: str, steps: Sequence[StepMeasurement]) -> Fix:
    """The setting to change first: whatever keeps the smallest launch-bound batch so, else what moves fewer bytes."""
    limits = [(step, judge(step, device_type)) for step in steps]
    launch_bound = [step for step, limit in limits if limit is Limit.LAUNCH]
    if launch_bound:
        return _fix_launches(config, device_type, launch_bound[0])
    host_bound = [step for step, limit in limits if limit is Limit.HOST]
    if host_bound:
        return Fix(
            None,
            None,
            f"At batch {host_bound[0].batch} the device waits for scheduling and sampling on the host, not launches;"
            " give the engine a faster or less shared CPU core.",
        )
    return _fix_work(config, device_type, *limits[-1])


def _fix_launches(config: EngineConfig, device_type: str, step: StepMeasurement) -> Fix:
    what = "dispatching" if device_type == "cpu" else "launching"
    cost = f"At batch {step.batch} {what} {step.launches:.0f} ops costs {step.launching_us:.0f} us of a step of "
    cost += f"{step.step_us:.0f} us"
    if config.enforce_eager:
        return Fix("enforce_eager", False, f"{cost}, and enforce_eager turns off what would launch them in one call.")
    if device_type == "cpu":
        if step.launches < step.kernels:
            return Fix(None, None, f"{cost}; the model itself is one native call, what is left is sampling and input.")
        return Fix(None, None, f"{cost}; no setting removes it: this model does not run as a recorded native program.")
    compilation = config.compilation_config
    if step.runs_as == CUDAGraphMode.NONE.name:
        mode = compilation.cudagraph_mode or CUDAGraphMode.FULL_AND_PIECEWISE
        if mode is CUDAGraphMode.NONE:
            key = "compilation_config.cudagraph_mode"
            return Fix(key, CUDAGraphMode.FULL_AND_PIECEWISE.name, f"{cost}; a graph launches them in one call.")
        key = "compilation_config.max_cudagraph_capture_size"
        return Fix(key, step.batch, f"{cost}, since no captured graph is as large as this batch.")
    if step.runs_as == CUDAGraphMode.PIECEWISE.name:
        key = "compilation_config.cudagraph_mode"
        why = f"{cost}, most of it attention between the pieces; a full graph of a decode batch holds attention too."
        return Fix(key, CUDAGraphMode.FULL_AND_PIECEWISE.name, why)
    return Fix(None, None, f"{cost}, although it runs as a full graph; what is left is sampling and input preparation.")


def _fix_work(config: EngineConfig, device_type: str, step: StepMeasurement, limit: Limit) -> Fix:
    times = max(1.0, step.step_us / step.work.floor_us)
    state = f"At batch {step.batch} a step takes {times:.1f} times what its {_floor_text(step, limit)} takes at best"
    if config.dtype == "float32":
        return Fix("dtype", "bfloat16", f"{state}; half as many bytes per weight halve both floors.")
    is_plain = config.compile_mode(device_type) is CompilationMode.NONE
    if device_type == "cuda" and is_plain:
        key, value = ("enforce_eager", False) if config.enforce_eager else ("compilation_config.mode", "VLLM_COMPILE")
        return Fix(key, value, f"{state}; compiled pieces fuse small kernels and move less memory.")
    if limit is Limit.MEMORY and step.batch >= config.max_num_seqs:
        why = f"{state}, and that is mostly weights, read once per step whatever the batch; more requests share them."
        return Fix("max_num_seqs", 2 * config.max_num_seqs, why)
    return Fix(None, None, f"{state}; launching is not the problem, and no setting here is either.")


def _floor_text(step: StepMeasurement, limit: Limit) -> str:
    if limit is Limit.MEMORY:
        return f"{step.work.num_bytes / 1e9:.2f} GB of memory traffic"
    return f"{step.work.flops / 1e9:.1f} GFLOP"


def _line(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """A line through points, made flat where it would fall, that a few points off the line do not bend.

    One row takes kernels of its own, so the smallest batch is often such a point. Slope and height are the medians over
    pairs and points (Theil, 1950; Sen, 1968).
    """
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2) if x1 != x2]
    slope = max(0.0, statistics.median(slopes)) if slopes else 0.0
    height = statistics.median(y - slope * x for x, y in points)
    return lambda x: height + slope * x


def _measured_crossover(rows: Sequence[Comparison]) -> int | None:
    """Where the speed-up passes ``MATTERS`` for good, between two batches on a logarithmic scale."""
    last = max((index for index, row in enumerate(rows) if row.speedup > MATTERS), default=-1)
    if last == len(rows) - 1:
        return None
    if last < 0:
        return rows[0].batch
    before, after = rows[last], rows[last + 1]
    share = (before.speedup - MATTERS) / (before.speedup - after.speedup)
    return round(math.exp(math.log(before.batch) + share * math.log(after.batch / before.batch)))
