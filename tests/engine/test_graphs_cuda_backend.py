"""The CUDA backend's own steps, with a recorder in the place of ``torch.cuda``: which calls, in which order, and
what is left after a capture breaks. What they do on a device is tested in tests/gpu."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from workers.graphs import make_graph_backend
from workers.graphs.backends import cuda as module
from workers.graphs.backends.cuda import CudaGraphBackend


class FakeCuda:
    """Records calls; fails where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.num_pools = 0
        self.reserved = 1000
        self.fail_capture_begin = self.fail_capture_end = False
        self.is_recording = False  # what the device's allocator thinks
        self.tells_allocator = False  # capture_end() does, even if it then fails, since PyTorch 2.12
        fake = self

        class Graph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                fake.calls.append(f"begin pool {pool}")
                fake.is_recording = True
                if fake.fail_capture_begin:
                    raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")

            def capture_end(self) -> None:
                fake.calls.append("end")
                fake.is_recording = fake.fail_capture_end and not fake.tells_allocator
                if fake.fail_capture_end:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def reset(self) -> None:
                fake.calls.append("reset")

            def replay(self) -> None:
                fake.calls.append("replay")

        class Stream:
            def __init__(self, name: Any) -> None:
                self.name = name if isinstance(name, str) else "side"

            def synchronize(self) -> None:
                fake.calls.append(f"wait for {self.name}")

        @contextlib.contextmanager
        def scope(_: Any) -> Iterator[None]:
            yield

        replacements = {
            "CUDAGraph": Graph,
            "Stream": Stream,
            "stream": scope,
            "device": scope,
            "current_stream": lambda: Stream("main"),
            "synchronize": lambda: self.calls.append("synchronize"),
            "empty_cache": lambda: self.calls.append("empty_cache"),
            "graph_pool_handle": self.new_pool,
            "memory_stats_as_nested_dict": lambda _: {"reserved_bytes": {"all": {"current": self.reserved}}},
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

        def end_allocate(_: int, pool: int) -> None:
            if not self.is_recording:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.is_recording = False
            self.calls.append(f"end allocating to {pool}")

        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda _, pool: self.calls.append(f"release {pool}"), raising=False
        )
        monkeypatch.setattr(module, "_broken", [])

    def new_pool(self) -> int:
        self.num_pools += 1
        return self.num_pools

    def take_calls(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_one_clean_up_for_a_series_of_captures(fake: FakeCuda) -> None:
    backend = make_graph_backend(torch.device("cuda", 0))
    assert backend.name == "cuda"
    with backend.capturing():
        graphs = [backend.capture(lambda: torch.ones(2), (), {})[0] for _ in range(3)]
    assert fake.take_calls() == [
        "wait for main",
        "empty_cache",
        *["begin pool 1", "end"] * 3,
        "wait for side",
    ]
    with backend.capturing(clean_up=False):
        backend.capture(lambda: None, (), {})
    assert fake.take_calls() == ["wait for main", "begin pool 1", "end", "wait for side"]
    graphs[1].replay()
    assert fake.take_calls() == ["replay"]


def test_bytes_are_what_a_capture_adds_to_the_allocator(fake: FakeCuda) -> None:
    backend = CudaGraphBackend(torch.device("cuda", 0))

    def grow(num_bytes: int) -> torch.Tensor:
        fake.reserved += num_bytes
        return torch.ones(3)

    with backend.capturing():
        graphs = [backend.capture(grow, (num_bytes,), {})[0] for num_bytes in (700, 0, 50)]
    assert [graph.num_bytes for graph in graphs] == [700, 0, 50]
    assert backend.bytes_held() == 750
    fake.take_calls()
    backend.clear()
    assert fake.take_calls() == ["synchronize", "empty_cache"]
    assert backend.bytes_held() == 0
    with backend.capturing(clean_up=False):
        backend.capture(lambda: None, (), {})
    assert "begin pool 2" in fake.take_calls()


def test_outputs_are_kept_by_address_only(fake: FakeCuda) -> None:
    backend = CudaGraphBackend(torch.device("cuda", 0))
    with backend.capturing():
        graph, outputs = backend.capture(lambda: (torch.arange(3), {"a": torch.ones(1), "n": 3}), (), {})
    assert graph.outputs[0] is not outputs[0]
    assert graph.outputs[0].data_ptr() == outputs[0].data_ptr()
    assert graph.outputs[0].untyped_storage()._cdata != outputs[0].untyped_storage()._cdata
    assert graph.outputs[1]["n"] == 3


@pytest.mark.parametrize("error", [KeyError("bug"), TypeError("bug"), KeyboardInterrupt()])
def test_an_error_of_the_callable_ends_the_capture(fake: FakeCuda, error: BaseException) -> None:
    backend = CudaGraphBackend(torch.device("cuda", 0))

    def fail() -> None:
        raise error

    with pytest.raises(type(error)), backend.capturing(clean_up=False):
        backend.capture(fail, (), {})
    assert fake.take_calls() == ["wait for main", "begin pool 1", "end", "reset", "wait for side"]
    with backend.capturing(clean_up=False):
        backend.capture(lambda: None, (), {})
    assert "begin pool 2" in fake.take_calls()  # the reset graph was the only one of pool 1
    assert module._broken == []


def test_a_pool_is_not_recorded_into_again_once_its_last_graph_is_gone(fake: FakeCuda) -> None:
    """PyTorch's allocator of pinned memory asserts that a pool that it knows is in use."""
    backend = CudaGraphBackend(torch.device("cuda", 0))
    with backend.capturing(clean_up=False):
        first, _ = backend.capture(lambda: None, (), {})
        second, _ = backend.capture(lambda: None, (), {})
        del first
        third, _ = backend.capture(lambda: None, (), {})
        del second, third
        backend.capture(lambda: None, (), {})
    begun = [call for call in fake.take_calls() if call.startswith("begin")]
    assert begun == ["begin pool 1"] * 3 + ["begin pool 2"]


def test_a_capture_that_does_not_begin_leaves_no_allocator_recording(fake: FakeCuda) -> None:
    backend = CudaGraphBackend(torch.device("cuda", 0))
    fake.fail_capture_begin = True
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"), backend.capturing(clean_up=False):
        backend.capture(lambda: None, (), {})
    assert not fake.is_recording
    fake.fail_capture_begin = False
    with backend.capturing(clean_up=False):
        backend.capture(lambda: None, (), {})
    assert "begin pool 2" in fake.take_calls()


def test_a_broken_capture_moves_on_to_a_new_pool_and_reports_the_first_error(
    fake: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    backend = CudaGraphBackend(torch.device("cuda", 0))

    def synchronise() -> None:
        fake.fail_capture_end = True
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"), backend.capturing(clean_up=False):
        backend.capture(synchronise, (), {})
    assert "a capture was invalidated: operation failed" in caplog.text
    assert fake.take_calls()[1:-1] == ["begin pool 1", "end", "end allocating to 1", "release 1"]
    assert len(module._broken) == 1  # the allocator of pinned memory still asks it
    fake.fail_capture_end = False
    with backend.capturing(clean_up=False):
        backend.capture(lambda: None, (), {})
    assert "begin pool 2" in fake.take_calls()


def test_an_error_at_the_end_of_a_capture(fake: FakeCuda) -> None:
    backend = CudaGraphBackend(torch.device("cuda", 0))
    fake.fail_capture_end = True
    with pytest.raises(RuntimeError, match="previous error"), backend.capturing(clean_up=False):
        backend.capture(lambda: torch.ones(1), (), {})
    assert "release 1" in fake.take_calls()
    assert backend.bytes_held() == 0


def test_a_version_that_ends_a_broken_capture_itself_is_not_told_again(fake: FakeCuda) -> None:
    backend = CudaGraphBackend(torch.device("cuda", 0))
    fake.fail_capture_end = fake.tells_allocator = True
    with pytest.raises(RuntimeError, match="previous error"), backend.capturing(clean_up=False):
        backend.capture(lambda: torch.ones(1), (), {})
    assert fake.take_calls()[1:-1] == ["begin pool 1", "end", "reset"]
    assert module._broken == []


def test_memory_of_earlier_pools_counts_while_their_graphs_live(fake: FakeCuda) -> None:
    backend = CudaGraphBackend(torch.device("cuda", 0))

    def grow(num_bytes: int) -> torch.Tensor:
        fake.reserved += num_bytes
        return torch.ones(1)

    with backend.capturing(clean_up=False):
        graph, _ = backend.capture(grow, (700,), {})
        fake.fail_capture_end = True
        with pytest.raises(RuntimeError):
            backend.capture(grow, (30,), {})
        fake.fail_capture_end = False
        other, _ = backend.capture(grow, (50,), {})
    assert backend.bytes_held() == 750
    del graph
    assert backend.bytes_held() == other.num_bytes == 50
