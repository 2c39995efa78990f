"""Counts what a stretch of work launched, with torch's profiler.

On CUDA: kernels that ran, launches that the host made (of single kernels and of whole graphs), and when the device was
busy. On a CPU: ops that Python dispatched. Knows events by their names; knows nothing about engines.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

#: CUDA runtime and driver calls that launch one kernel.
_KERNEL_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel")
_GRAPH_LAUNCHES = ("cudaGraphLaunch", "cuGraphLaunch")
#: What the device itself needs between two kernels of a graph; no launch could shorten it.
_TURNAROUND_US = 1.5

#: Device activities that are no kernels.
_TRANSFERS = ("Memcpy", "Memset")


@dataclasses.dataclass(frozen=True, slots=True)
class WorkProfile:
    """What one step did; every figure is a mean over the profiled steps.

    Attributes:
        kernels: Kernels that ran on the device, inside graphs or not. On a CPU: dispatched ops.
        kernel_launches: Launches of single kernels by the host. On a CPU: dispatched ops.
        graph_launches: Launches of whole graphs; 0 on a CPU, where the profiler cannot see them.
        transfers: Copies and fills on the device.
        busy_us: Time in which the device ran anything or turned from one kernel to the next. On a CPU: time inside
            dispatched ops.
        kernel_us: Mean duration of one kernel (of one op).
        dispatched: Ops that Python dispatched, by name, over all profiled steps.
    """

    kernels: float
    kernel_launches: float
    graph_launches: float
    transfers: float
    busy_us: float
    kernel_us: float
    dispatched: Counter[str]

    @property
    def launches(self) -> float:
        """Everything the host launched."""
        return self.kernel_launches + self.graph_launches


@dataclasses.dataclass(frozen=True, slots=True)
class Activity:
    """What ran from when to when."""

    name: str
    start_us: float
    end_us: float


def profile_work(work: Callable[[], Any], num_steps: int, device: torch.device) -> WorkProfile:
    """Run ``work``, which does ``num_steps`` steps, under the profiler."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with warnings.catch_warnings():
        # It says that no CUDA is here, or that a kernel name was shortened.
        warnings.simplefilter("ignore")
        with profile(activities=activities) as profiler:
            work()
            if on_cuda:
                torch.cuda.synchronize(device)
        events = list(profiler.events() or ())
    return _of_cuda(events, num_steps) if on_cuda else _of_cpu(events, num_steps)


def _of_cuda(events: Sequence[Any], num_steps: int) -> WorkProfile:
    launches = sum(event.name.startswith(_KERNEL_LAUNCHES) for event in events)
    graphs = sum(event.name.startswith(_GRAPH_LAUNCHES) for event in events)
    on_device = [
        Activity(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    kernels = [activity for activity in on_device if not activity.name.startswith(_TRANSFERS)]
    return WorkProfile(
        kernels=len(kernels) / num_steps,
        kernel_launches=launches / num_steps,
        graph_launches=graphs / num_steps,
        transfers=(len(on_device) - len(kernels)) / num_steps,
        busy_us=busy_time(on_device, _TURNAROUND_US) / num_steps,
        kernel_us=sum(kernel.end_us - kernel.start_us for kernel in kernels) / max(1, len(kernels)),
        dispatched=Counter(activity.name for activity in _dispatched(events)),
    )


def _of_cpu(events: Sequence[Any], num_steps: int) -> WorkProfile:
    dispatched = _dispatched(events)
    busy_us = busy_time(dispatched)
    return WorkProfile(
        kernels=len(dispatched) / num_steps,
        kernel_launches=len(dispatched) / num_steps,
        graph_launches=0.0,
        transfers=0.0,
        busy_us=busy_us / num_steps,
        kernel_us=busy_us / max(1, len(dispatched)),
        dispatched=Counter(activity.name for activity in dispatched),
    )


def _dispatched(events: Sequence[Any]) -> list[Activity]:
    """Ops that no other op called."""
    return [
        Activity(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CPU and event.cpu_parent is None and "::" in event.name
    ]


def busy_time(activities: Iterable[Activity], bridged_us: float = 0.0) -> float:
    """Length of the union of intervals, in microseconds: what overlaps counts once, gaps up to ``bridged_us`` count."""
    total, end = 0.0, float("-inf")
    for activity in sorted(activities, key=lambda activity: activity.start_us):
        if activity.end_us > end:
            starts_late = activity.start_us > end + bridged_us
            total += activity.end_us - (activity.start_us if starts_late else end)
            end = activity.end_us
    return total
