"""What this device charges: for a launch, a replay, a capture, a byte and an operation.

Measures with tiny and with huge ops; knows nothing about models. On a CPU a launch is the dispatch of an op, and a
replay runs the ops again (the host backend), which is said in ``source``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch

from workers.analysis.crossover import StepCosts
from workers.graphs.backends.base import GraphBackend
from workers.graphs.backends.factory import make_graph_backend
from workers.graphs.context import ForwardContext, set_forward_context
from workers.graphs.descriptor import BatchDescriptor
from workers.graphs.wrapper import CUDAGraphWrapper
from workers.kernels.linear import Linear
from workers.modes import CUDAGraphMode

_REPEATS = 7
_CALLS = 50

#: Bytes copied and rows of the square matrices multiplied, by kind of device: well beyond caches, still quick.
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 512}


@dataclasses.dataclass(frozen=True, slots=True)
class MeasuredCosts:
    """Costs of launching, replaying and capturing a chain of tiny ops, in microseconds.

    Attributes:
        source: On what they were measured, and what a replay is there.
    """

    costs: list[StepCosts]
    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceRates:
    """What the device can do at best.

    Attributes:
        bandwidth: Bytes read and written per second by a large copy.
        matmul_flops: Multiplications and additions per second of a large matrix product.
        launch_us: CPU time of launching (on a CPU: dispatching) one tiny op.
    """

    bandwidth: float
    matmul_flops: float
    launch_us: float

    def at_least(self, num_bytes: float, flops: float, seconds: float) -> DeviceRates:
        """Raised to what work that took ``seconds`` shows: other work on a machine only ever lowers a measured rate."""
        return dataclasses.replace(
            self,
            bandwidth=max(self.bandwidth, num_bytes / seconds),
            matmul_flops=max(self.matmul_flops, flops / seconds),
        )


def measure_step_costs(num_ops: Sequence[int], device: torch.device) -> MeasuredCosts:
    """Time a chain of each length launched op by op, replayed, and captured."""
    backend = make_graph_backend(device)
    costs = [_chain_costs(ops, device, backend) for ops in num_ops]
    if device.type == "cuda":
        return MeasuredCosts(costs, f"measured on {describe_device(device)}; a replay is one graph launch")
    return MeasuredCosts(
        costs,
        f"measured on {describe_device(device)}; a host graph replays by dispatching its ops again, so there is nothing"
        " to gain here",
    )


@torch.inference_mode()
def measure_rates(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    """Time a large copy, a large matrix product and a tiny op; about a second."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = seconds_per_call(lambda: target.copy_(source), device, calls=3)
    size = _MATMUL_SIZE[device.type]
    # The engine's own layer: on a CPU its kernel is several times as fast as torch.mm in bf16.
    linear = Linear(size, size, dtype=dtype, device=device)
    assert linear.weight is not None
    linear.weight.data.normal_()
    linear.finalize()
    x = torch.ones(size, size, dtype=dtype, device=device)
    matmul_s = seconds_per_call(lambda: linear(x), device, calls=3)
    return DeviceRates(2 * source.nbytes / copy_s, 2 * size**3 / matmul_s, _chain_seconds(100, device) * 1e6 / 100)


def seconds_per_call(call: Callable[[], object], device: torch.device, calls: int = _CALLS) -> float:
    """The least, over repeats, of the mean time of ``calls`` calls in a row, the device's work included."""
    call()
    samples = []
    for _ in range(_REPEATS):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        samples.append((time.perf_counter() - started) / calls)
    return min(samples)


def describe_device(device: torch.device) -> str:
    """The device, and what of it is used, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def _chain_costs(ops: int, device: torch.device, backend: GraphBackend) -> StepCosts:

    x = torch.zeros(1, device=device)
    chain = _chain(ops)
    descriptor = BatchDescriptor(ops)
    capture_us = []
    for _ in range(_REPEATS):
        wrapper = CUDAGraphWrapper(chain, CUDAGraphMode.FULL, backend)
        context = ForwardContext(None, None, (), CUDAGraphMode.FULL, descriptor)
        with set_forward_context(context), backend.capturing(clean_up=False):
            chain(x)
            synchronize(device)
            started = time.perf_counter()
            wrapper(x)
            capture_us.append((time.perf_counter() - started) * 1e6)
    with set_forward_context(context):
        replay_s = seconds_per_call(lambda: wrapper(x), device)
    return StepCosts(ops, _chain_seconds(ops, device) * 1e6, replay_s * 1e6, min(capture_us), "us")


def _chain_seconds(ops: int, device: torch.device) -> float:
    x = torch.zeros(1, device=device)
    chain = _chain(ops)
    return seconds_per_call(lambda: chain(x), device)


def _chain(ops: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(ops):
            x = x.add_(1.0)
        return x

    return run
