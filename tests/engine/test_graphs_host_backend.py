"""The host backend and its pool: addresses, aliases, memory, and outputs of every accepted form."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.graphs.backends.base import CapturedGraph
from workers.graphs.backends.host import HostGraphBackend
from workers.graphs.backends.host_pool import HostPool
from workers.graphs.backends.weak_ref import weak_ref_tensor
from workers.graphs.trees import iter_leaves


def _capture(backend: HostGraphBackend, function: Any, *args: Any, **kwargs: Any) -> tuple[CapturedGraph, Any]:
    with backend.capturing(clean_up=False):
        return backend.capture(function, args, kwargs)


class Result(NamedTuple):
    total: torch.Tensor
    name: str


def test_outputs_of_every_form_keep_their_structure_and_addresses() -> None:
    def run(x: torch.Tensor) -> Any:
        return Result(x + 1, "a"), [x * 2, None, 3], {"t": x.view(2, 2).t() * 1.0, "empty": x[:0] + 1}

    backend, x = HostGraphBackend(), torch.arange(4.0)
    graph, outputs = _capture(backend, run, x)
    addresses = {name: leaf.data_ptr() for name, leaf in iter_leaves("", outputs) if isinstance(leaf, torch.Tensor)}
    x.mul_(10)
    graph.replay()
    result, many, named = graph.outputs
    assert isinstance(result, Result)
    assert result.name == "a"
    assert many[1:] == [None, 3]
    assert result.total.tolist() == [1, 11, 21, 31]
    assert many[0].tolist() == [0, 20, 40, 60]
    assert named["t"].tolist() == [[0, 20], [10, 30]]
    assert named["t"].stride() == (1, 2)
    assert named["empty"].shape == (0,)
    for name, leaf in iter_leaves("", graph.outputs):
        if isinstance(leaf, torch.Tensor) and leaf.numel():
            assert leaf.data_ptr() == addresses[name]


@dataclasses.dataclass
class Bad:
    x: torch.Tensor


@pytest.mark.parametrize("output", [object(), {1, 2}, [iter(())], Bad(torch.ones(1)), (Bad(torch.ones(1)),)])
def test_outputs_in_which_tensors_could_hide_are_refused(output: Any) -> None:
    backend = HostGraphBackend()
    with pytest.raises(TypeError, match="a captured callable returned a"):
        _capture(backend, lambda: output)
    assert backend.bytes_held() == 0


def test_an_input_that_is_handed_on_is_not_copied() -> None:
    def run(x: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        buffer.copy_(x)
        return buffer, buffer[1:]

    backend, x, buffer = HostGraphBackend(), torch.ones(4), torch.zeros(4)
    graph, _ = _capture(backend, run, x, buffer)
    assert backend.bytes_held() == 0
    x.fill_(7)
    graph.replay()
    assert graph.outputs[0].data_ptr() == buffer.data_ptr()
    assert graph.outputs[1].data_ptr() == buffer[1:].data_ptr()
    assert buffer.tolist() == [7.0] * 4


def test_a_result_of_another_shape_is_refused() -> None:
    shape, as_tuple = (2,), False

    def run() -> Any:
        result = torch.zeros(shape)
        return (result,) if as_tuple else result

    backend = HostGraphBackend()
    graph, _ = _capture(backend, run)
    shape = (3,)
    with pytest.raises(RuntimeError, match=r"output was \(2,\) torch.float32 at capture and is \(3,\)"):
        graph.replay()
    shape, as_tuple = (2,), True
    with pytest.raises(RuntimeError, match=r"returned output at capture and output\[0\] now"):
        graph.replay()


def test_capture_needs_permission() -> None:
    with pytest.raises(RuntimeError, match=r"only inside 'with backend\.capturing"):
        HostGraphBackend().capture(torch.ones, (1,), {})


def test_replay_in_and_out_of_inference_mode() -> None:
    backend, x = HostGraphBackend(), torch.ones(3)
    with torch.inference_mode():
        graph, outputs = _capture(backend, lambda y: y.exp(), x)
    graph.replay()
    with torch.inference_mode():
        graph.replay()
    assert not outputs.is_inference()
    weight = torch.ones(3, requires_grad=True)
    graph, outputs = _capture(backend, lambda y: y * weight, x)
    graph.replay()
    assert not outputs.requires_grad


def test_memory_is_reused_once_the_outputs_are_gone() -> None:
    backend, x = HostGraphBackend(), torch.ones(100)
    first, outputs = _capture(backend, lambda y: y + 1, x)
    address = outputs.data_ptr()
    assert backend.bytes_held() == first.num_bytes == 400
    second, more = _capture(backend, lambda y: y + 2, x)  # the first outputs are alive
    assert more.data_ptr() != address
    assert backend.bytes_held() == 800
    view = outputs[10:20]
    del outputs
    third, yet_more = _capture(backend, lambda y: y[:50] + 3, x)  # a view keeps the memory busy
    assert yet_more.data_ptr() not in (address, more.data_ptr())
    del view
    fourth, reused = _capture(backend, lambda y: y[:60] + 4, x)
    assert reused.data_ptr() == address
    assert fourth.num_bytes == 0
    for graph, expected in [(first, 2.0), (second, 3.0), (third, 4.0), (fourth, 5.0)]:
        graph.replay()
        assert set(graph.outputs.tolist()) == {expected}
    assert backend.bytes_held() == 800 + 200


def test_a_captured_output_as_input_of_the_next_graph_does_not_keep_its_memory() -> None:
    backend = HostGraphBackend()
    buffer = torch.ones(64)

    def capture_chain(num_tokens: int) -> list[CapturedGraph]:
        first, hidden = _capture(backend, lambda x: x + 1, buffer[:num_tokens])
        second, _ = _capture(backend, lambda *, h: h * 2, h=hidden[:])
        return [first, second]

    chains = [capture_chain(num_tokens) for num_tokens in (64, 32, 16)]
    assert backend.bytes_held() == 2 * 64 * 4
    buffer.fill_(4)
    for first, second in chains:
        first.replay()
        second.replay()
        assert set(second.outputs.tolist()) == {10.0}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=25))
def test_pool_never_hands_out_memory_that_is_in_use(steps: list[tuple[int, bool]]) -> None:
    pool = HostPool()
    live: list[tuple[torch.Tensor, torch.Tensor]] = []
    for size, drop_one in steps:
        if drop_one and live:
            live.pop(size % len(live))
        value = torch.full((size,), float(len(live) + 1), dtype=torch.float64)
        owner, alias = pool.put(value)
        assert owner.data_ptr() == alias.data_ptr()
        live.append((owner[:], value))
        del owner, alias
        for tensor, expected in live:
            assert torch.equal(tensor, expected)
        spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * 8) for t, _ in live if t.numel())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert pool.bytes_held >= sum(tensor.numel() * 8 for tensor, _ in live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_pool_keeps_dtype_shape_and_strides(dtype: torch.dtype) -> None:
    pool = HostPool()
    source = torch.arange(24).reshape(2, 3, 4).to(dtype)
    for tensor in (source, source.permute(2, 0, 1), source[:, 1:, ::2], source[0, 0, 0], source[:0]):
        owner, alias = pool.put(tensor)
        assert owner.stride() == alias.stride() == tensor.stride()
        assert torch.equal(owner, tensor)
        again = pool.alias(owner[1:] if owner.dim() and owner.shape[0] > 1 else owner)
        assert again is not None
        assert torch.equal(again, tensor[1:] if tensor.dim() and tensor.shape[0] > 1 else tensor)
    assert pool.alias(source) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_weak_ref_tensor_sees_the_memory_and_does_not_own_it(dtype: torch.dtype) -> None:
    base = torch.arange(24).reshape(4, 6).to(dtype)
    for tensor in (base, base[1:, ::2], base.t(), base[2, 3]):
        weak = weak_ref_tensor(tensor)
        assert torch.equal(weak, tensor)
        assert (weak.data_ptr(), weak.shape, weak.stride()) == (tensor.data_ptr(), tensor.shape, tensor.stride())
    weak = weak_ref_tensor(base)
    base.fill_(3)
    assert set(weak.flatten().tolist()) == {3}
    assert weak.untyped_storage()._cdata != base.untyped_storage()._cdata
    assert weak_ref_tensor(base[:0]).shape == (0, 6)
    with torch.inference_mode():
        assert weak_ref_tensor(base).data_ptr() == base.data_ptr()


def test_weak_ref_tensor_does_not_keep_its_memory() -> None:
    array = np.ones(8, dtype=np.float32)[:]
    is_alive = weakref.ref(array)
    owner = torch.from_numpy(array)
    weak = weak_ref_tensor(owner)
    del array
    assert is_alive() is not None
    del owner
    assert is_alive() is None
    assert weak.shape == (8,)
