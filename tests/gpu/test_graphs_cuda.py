"""Captured graphs on a CUDA device: the same numbers from every mode, shared memory, and what breaks a capture."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.graph_toys import SLOTS, ToyRequest, ToyRunner, random_batches
from workers.graphs import (
    BatchDescriptor,
    CUDAGraphMode,
    CUDAGraphWrapper,
    ForwardContext,
    GraphCounters,
    default_capture_sizes,
    make_graph_backend,
    set_forward_context,
)
from workers.graphs.backends.cuda import CudaGraphBackend
from workers.graphs.backends.weak_ref import weak_ref_tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

M = CUDAGraphMode
MIB = 1 << 20
SIZES = [1, 2, 4, 6, 8, 16, 24]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def backend(device: torch.device) -> CudaGraphBackend:
    backend = make_graph_backend(device)
    assert isinstance(backend, CudaGraphBackend)
    return backend


@contextlib.contextmanager
def _in_context(mode: CUDAGraphMode, num_tokens: int) -> Iterator[None]:
    with set_forward_context(ForwardContext(None, None, (), mode, BatchDescriptor(num_tokens))):
        yield


def _capture(wrapper: CUDAGraphWrapper, backend: CudaGraphBackend, num_tokens: int, *args: Any) -> Any:
    """Warm up and capture, as a runner does."""
    with backend.capturing():
        with _in_context(M.NONE, num_tokens):
            wrapper(*args)
        with _in_context(wrapper.runtime_mode, num_tokens):
            return wrapper(*args)


@pytest.mark.parametrize("mode", list(M))
@pytest.mark.parametrize("background", [False, True], ids=["all captured first", "captured in idle gaps"])
def test_every_mode_gives_the_eager_numbers(device: torch.device, mode: CUDAGraphMode, background: bool) -> None:
    reference = ToyRunner(device, M.NONE, SIZES, 6)
    runner = ToyRunner(
        device, mode, SIZES, 6, backend=make_graph_backend(device), first_sizes=[] if background else "all"
    )
    runner.capturer.capture_first_set()
    rng = random.Random(7)
    for index, batch in enumerate(random_batches(random.Random(5), 6, 60)):
        torch.testing.assert_close(runner.step(batch), reference.step(batch))
        if background and index % 3 == 0:
            runner.capturer.capture_next(idle=rng.random() < 0.8)
    for cache_NH, expected_NH in zip(runner.caches_LNH, reference.caches_LNH, strict=True):
        torch.testing.assert_close(cache_NH[:SLOTS], expected_NH[:SLOTS])
    if mode is not M.NONE:
        assert runner.counters.num_replays() > 0


def test_every_default_size_is_captured_and_right(device: torch.device) -> None:
    sizes = default_capture_sizes(48, 96)
    runner = ToyRunner(
        device,
        M.FULL_AND_PIECEWISE,
        sizes,
        48,
        backend=make_graph_backend(device),
        first_sizes="all",
        max_num_tokens=96,
    )
    reference = ToyRunner(device, M.NONE, sizes, 48, max_num_tokens=96)
    runner.capturer.capture_first_set()
    assert runner.plan.is_done
    for num_reqs in range(1, 49):
        requests = [ToyRequest([n % 50, 3], 0, [2 * n, 2 * n + 1]) for n in range(num_reqs)]
        for query_len in (1, 2):
            batch = [(request, query_len) for request in requests]
            torch.testing.assert_close(runner.step(batch), reference.step(batch))
    assert runner.counters.fallbacks == {}


def test_replay_reads_new_values_at_the_captured_addresses(backend: CudaGraphBackend, device: torch.device) -> None:
    wrapper = CUDAGraphWrapper(lambda x: (x @ x.T, [x.sum(0)]), M.FULL, backend, debug_graph_inputs=True)
    x = torch.randn(8, 8, device=device)
    captured = _capture(wrapper, backend, 8, x)
    for seed in range(3):
        x.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)))
        with _in_context(M.FULL, 8):
            product, (total,) = wrapper(x)
        torch.testing.assert_close(product, x @ x.T)
        torch.testing.assert_close(total, x.sum(0))
        assert product.data_ptr() == captured[0].data_ptr()
    moved = x.clone()
    with _in_context(M.FULL, 8), pytest.raises(RuntimeError, match="input 'x' moved"):
        wrapper(moved)


def test_memory_does_not_grow_with_the_number_of_sizes(device: torch.device) -> None:
    width, rows = 4096, 2048
    weight = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    buffer = torch.randn(rows, width, device=device, dtype=torch.bfloat16)

    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.relu(x @ weight)
        return x

    held = {}
    for name, sizes in {"largest": [rows], "many": list(range(rows, 0, -128))}.items():
        backend = CudaGraphBackend(device)
        pieces = [CUDAGraphWrapper(run, M.PIECEWISE, backend) for _ in range(3)]
        for size in sizes:
            with backend.capturing(clean_up=size == rows):
                for mode in (M.NONE, M.PIECEWISE):
                    with _in_context(mode, size):
                        hidden = buffer[:size]
                        for piece in pieces:
                            hidden = piece(hidden)
                        del hidden
        held[name] = backend.bytes_held()
        with _in_context(M.PIECEWISE, rows):
            hidden = buffer
            for piece in pieces:
                hidden = piece(hidden)
        assert torch.isfinite(hidden).all()
    one_output = rows * width * 2
    assert held["largest"] >= 2 * one_output
    # The sum over sizes would be more than eight times the largest; blocks come in steps of 2 to 20 MiB.
    assert held["many"] <= held["largest"] + 64 * MIB


def test_clear_returns_the_memory(backend: CudaGraphBackend, device: torch.device) -> None:
    gc.collect()  # graphs of earlier tests
    x = torch.randn(1024, 16384, device=device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    counters = GraphCounters()
    wrapper = CUDAGraphWrapper(lambda x: torch.relu(x) * 2, M.FULL, backend, counters=counters)
    _capture(wrapper, backend, 1024, x)
    torch.cuda.empty_cache()
    assert backend.bytes_held() >= 64 * MIB
    assert torch.cuda.memory_reserved() - before >= 64 * MIB
    assert counters.by_key()[M.FULL, BatchDescriptor(1024)].num_bytes == backend.bytes_held()
    backend.clear()
    assert torch.cuda.memory_reserved() == before
    assert counters.num_graphs() == 0
    _capture(wrapper, backend, 1024, x)
    with _in_context(M.FULL, 1024):
        torch.testing.assert_close(wrapper(x), torch.relu(x) * 2)


def test_an_exception_in_the_callable_leaves_everything_usable(backend: CudaGraphBackend, device: torch.device) -> None:
    x = torch.ones(4, device=device)
    good = CUDAGraphWrapper(lambda x: x + 1, M.FULL, backend)
    _capture(good, backend, 4, x)

    def fail(x: torch.Tensor) -> torch.Tensor:
        _ = x * 3
        if torch.cuda.is_current_stream_capturing():
            raise KeyError("a bug")
        return x

    with pytest.raises(KeyError):
        _capture(CUDAGraphWrapper(fail, M.FULL, backend), backend, 4, x)
    assert not torch.cuda.is_current_stream_capturing()
    _assert_usable(good, backend, x)


def test_work_that_cannot_be_captured_leaves_everything_usable(backend: CudaGraphBackend, device: torch.device) -> None:
    x = torch.ones(4, device=device)
    good = CUDAGraphWrapper(lambda x: x + 1, M.FULL, backend)
    _capture(good, backend, 4, x)
    bad = CUDAGraphWrapper(lambda x: x * x.sum().item(), M.FULL, backend)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            _capture(bad, backend, 4, x)
        assert bad.captured_descriptors() == []
        _assert_usable(good, backend, x)
    reserved = torch.cuda.memory_reserved()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for _ in range(20):  # blocks freed across streams come back only if no capture is thought to be under way
        block = torch.empty(64 * MIB, dtype=torch.uint8, device=device)
        block.record_stream(side)
        del block
        torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() <= reserved + 128 * MIB


def _assert_usable(good: CUDAGraphWrapper, backend: CudaGraphBackend, x: torch.Tensor) -> None:
    x.fill_(5)
    with _in_context(M.FULL, 4):
        assert good(x).tolist() == [6.0] * 4
    other = CUDAGraphWrapper(lambda x: x * 7, M.FULL, backend)
    _capture(other, backend, 4, x)
    with _in_context(M.FULL, 4):
        assert other(x).tolist() == [35.0] * 4
        assert good(x).tolist() == [6.0] * 4


def test_other_threads_may_allocate_and_wait_during_captures(backend: CudaGraphBackend, device: torch.device) -> None:
    stop = threading.Event()
    errors: list[Exception] = []

    def work() -> None:
        try:
            num_bytes = MIB
            while not stop.is_set():
                block = torch.ones(num_bytes, dtype=torch.uint8, device=device)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
                event.synchronize()
                assert int(block[-1].item()) == 1
                del block
                num_bytes = num_bytes % (256 * MIB) + MIB  # larger each time: a new block from the driver
        except (RuntimeError, AssertionError) as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        x = torch.ones(256, 256, device=device)
        wrapper = CUDAGraphWrapper(lambda x: torch.tanh(x @ x), M.FULL, backend)
        for num_tokens in range(1, 60):
            _capture(wrapper, backend, num_tokens, x)
    finally:
        stop.set()
        thread.join()
    assert errors == []
    with _in_context(M.FULL, 30):
        torch.testing.assert_close(wrapper(x), torch.tanh(x @ x))


def test_weak_ref_tensor_on_the_device(device: torch.device) -> None:
    base = torch.arange(24.0, device=device).view(4, 6)
    for tensor in (base, base[1:, ::2], base.t()):
        weak = weak_ref_tensor(tensor)
        assert weak.device == tensor.device
        assert torch.equal(weak, tensor)
        assert (weak.data_ptr(), weak.stride()) == (tensor.data_ptr(), tensor.stride())
    large = torch.empty(64 * MIB, dtype=torch.uint8, device=device)
    allocated = torch.cuda.memory_allocated()
    weak = weak_ref_tensor(large)
    assert torch.cuda.memory_allocated() == allocated
    del large
    assert torch.cuda.memory_allocated() <= allocated - 64 * MIB
    assert weak.shape == (64 * MIB,)


def test_discarding_the_only_graph_returns_its_pool(backend: CudaGraphBackend, device: torch.device) -> None:
    x = torch.randn(1024, 16384, device=device)
    wrapper = CUDAGraphWrapper(lambda x: torch.relu(x), M.FULL, backend)
    _capture(wrapper, backend, 1024, x)
    assert backend.bytes_held() >= 64 * MIB
    backend.discard(M.FULL, BatchDescriptor(1024))
    assert backend.bytes_held() == 0
    _capture(wrapper, backend, 1024, x)
    with _in_context(M.FULL, 1024):
        torch.testing.assert_close(wrapper(x), torch.relu(x))
