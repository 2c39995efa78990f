"""The wrapper's whole state table, nesting, input checks, and what an exception leaves behind."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from workers.graphs import (
    BatchDescriptor,
    CUDAGraphMode,
    CUDAGraphWrapper,
    ForwardContext,
    GraphBackend,
    GraphCounters,
    is_forward_context_available,
    make_graph_backend,
    set_forward_context,
)
from workers.graphs.backends.host import HostGraphBackend

M = CUDAGraphMode
KNOWN, UNKNOWN = BatchDescriptor(4), BatchDescriptor(8)


@contextlib.contextmanager
def _in_context(mode: CUDAGraphMode, descriptor: BatchDescriptor | None = KNOWN) -> Iterator[None]:
    with set_forward_context(ForwardContext(None, None, (), mode, descriptor)):
        yield


class Double:
    """A callable that counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return 2 * x


def _captured(
    wrapper: CUDAGraphWrapper, backend: GraphBackend, *args: Any, descriptor: BatchDescriptor = KNOWN, **kwargs: Any
) -> Any:
    with backend.capturing(clean_up=False), _in_context(wrapper.runtime_mode, descriptor):
        return wrapper(*args, **kwargs)


@pytest.mark.parametrize("wrapper_mode", [M.FULL, M.PIECEWISE])
@pytest.mark.parametrize("context_mode", [None, M.NONE, M.FULL, M.PIECEWISE])
@pytest.mark.parametrize(
    ("is_known", "is_allowed"), list(itertools.product([True, False], [True, False])), ids=lambda flag: str(flag)
)
def test_state_table(
    wrapper_mode: CUDAGraphMode, context_mode: CUDAGraphMode | None, is_known: bool, is_allowed: bool
) -> None:
    backend, counters, double = HostGraphBackend(), GraphCounters(), Double()
    wrapper = CUDAGraphWrapper(double, wrapper_mode, backend, counters=counters)
    x = torch.arange(4.0)
    first = _captured(wrapper, backend, x)
    descriptor = KNOWN if is_known else UNKNOWN
    captures, replays = counters.num_graphs(), counters.num_replays()

    scope = backend.capturing(clean_up=False) if is_allowed else contextlib.nullcontext()
    context = contextlib.nullcontext() if context_mode is None else _in_context(context_mode, descriptor)
    with scope, context:
        if context_mode is not wrapper_mode:
            result, expected = wrapper(x), (0, 0)
        elif is_known:
            result, expected = wrapper(x), (0, 1)
            assert result.data_ptr() == first.data_ptr()
        elif is_allowed:
            result, expected = wrapper(x), (1, 0)
        else:
            with pytest.raises(RuntimeError, match=f"no {wrapper_mode.name} graph of 8 tokens, and capturing is not"):
                wrapper(x)
            result, expected = 2 * x, (0, 0)
    torch.testing.assert_close(result, 2 * x)
    assert (counters.num_graphs() - captures, counters.num_replays() - replays) == expected
    assert not is_forward_context_available()


def test_replay_reads_the_captured_inputs_and_writes_the_captured_outputs() -> None:
    backend = HostGraphBackend()
    wrapper = CUDAGraphWrapper(Double(), M.FULL, backend)
    x = torch.ones(4)
    first = _captured(wrapper, backend, x)
    x.fill_(5)
    with _in_context(M.FULL):
        second = wrapper(x)
        other = wrapper(torch.full((4,), 100.0))  # not looked at: a graph reads where its capture read
    assert second.data_ptr() == first.data_ptr() == other.data_ptr()
    assert other.tolist() == [10.0] * 4


def test_runtime_modes_only() -> None:
    for mode in (M.NONE, M.FULL_AND_PIECEWISE, M.FULL_DECODE_ONLY):
        with pytest.raises(AssertionError, match="holds no graphs"):
            CUDAGraphWrapper(Double(), mode, HostGraphBackend())


def test_descriptors_are_separate_graphs() -> None:
    backend, double = HostGraphBackend(), Double()
    wrapper = CUDAGraphWrapper(double, M.FULL, backend)
    buffer = torch.arange(8.0)
    for descriptor in (BatchDescriptor(8, 8), BatchDescriptor(4, 4), BatchDescriptor(4, 4, True)):
        _captured(wrapper, backend, buffer[: descriptor.num_tokens], descriptor=descriptor)
    assert wrapper.captured_descriptors() == [
        BatchDescriptor(8, 8),
        BatchDescriptor(4, 4),
        BatchDescriptor(4, 4, True),
    ]
    with _in_context(M.FULL, BatchDescriptor(8, 8)):
        assert wrapper(buffer).shape == (8,)
    wrapper.discard(M.PIECEWISE, BatchDescriptor(8, 8))  # not this wrapper's mode
    wrapper.discard(M.FULL, BatchDescriptor(8, 8))
    assert wrapper.captured_descriptors() == [BatchDescriptor(4, 4), BatchDescriptor(4, 4, True)]
    assert wrapper.unwrap() is double


def test_full_stands_around_piecewise() -> None:
    backend, counters = HostGraphBackend(), GraphCounters()
    inner_calls = Double()
    inner = CUDAGraphWrapper(inner_calls, M.PIECEWISE, backend, counters=counters)
    outer = CUDAGraphWrapper(lambda x: inner(x) + 1, M.FULL, backend, counters=counters)
    x = torch.ones(4)
    full_key, piece_key = BatchDescriptor(4, 4, True), BatchDescriptor(4)
    with backend.capturing():
        for mode, descriptor in [(M.FULL, full_key), (M.PIECEWISE, piece_key)]:
            with _in_context(mode, descriptor):
                assert outer(x).tolist() == [3.0] * 4
    assert outer.captured_descriptors() == [full_key]
    assert inner.captured_descriptors() == [piece_key]
    x.fill_(2)
    with _in_context(M.FULL, full_key):
        assert outer(x).tolist() == [5.0] * 4
    assert (counters.num_replays(M.FULL), counters.num_replays(M.PIECEWISE)) == (1, 0)
    with _in_context(M.PIECEWISE, piece_key):
        assert outer(x).tolist() == [5.0] * 4
    assert (counters.num_replays(M.FULL), counters.num_replays(M.PIECEWISE)) == (1, 1)


def test_a_capture_inside_a_capture_is_refused() -> None:
    backend = HostGraphBackend()
    inner = CUDAGraphWrapper(Double(), M.FULL, backend)
    outer = CUDAGraphWrapper(lambda x: inner(x) + 1, M.FULL, backend)
    with pytest.raises(RuntimeError, match="inside the capture of another one"):
        _captured(outer, backend, torch.ones(4))
    assert outer.captured_descriptors() == inner.captured_descriptors() == []
    assert _captured(inner, backend, torch.ones(4)).tolist() == [2.0] * 4


def test_captures_of_other_threads_wait_for_their_turn() -> None:
    events: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def slow(x: torch.Tensor) -> torch.Tensor:
        events.append("slow begins")
        inside.set()
        assert go_on.wait(30)
        events.append("slow ends")
        return x + 1

    def fast(x: torch.Tensor) -> torch.Tensor:
        events.append("fast")
        return x + 1

    backend = HostGraphBackend()
    second_backend = HostGraphBackend()
    thread = threading.Thread(
        target=lambda: second_backend.capture(fast, (torch.ones(1),), {}),
    )
    with backend.capturing(clean_up=False), second_backend.capturing(clean_up=False):
        first = threading.Thread(target=lambda: backend.capture(slow, (torch.ones(1),), {}))
        first.start()
        assert inside.wait(30)
        thread.start()
        thread.join(0.05)
        go_on.set()
        first.join()
        thread.join()
    assert events == ["slow begins", "slow ends", "fast"]


class Broken(Exception):
    pass


def test_an_exception_during_capture_leaves_a_sane_state() -> None:
    backend, counters = HostGraphBackend(), GraphCounters()
    is_broken = True

    def run(x: torch.Tensor) -> torch.Tensor:
        collector_states.append(gc.isenabled())
        if is_broken:
            raise Broken
        return 2 * x

    collector_states: list[bool] = []
    wrapper = CUDAGraphWrapper(run, M.FULL, backend, counters=counters)
    assert gc.isenabled()
    x = torch.ones(4)
    with pytest.raises(Broken), backend.capturing(), _in_context(M.FULL):
        wrapper(x)
    assert collector_states == [False]
    assert gc.isenabled()
    assert not is_forward_context_available()
    assert not backend.is_capturing_allowed
    assert wrapper.captured_descriptors() == []
    assert counters.num_graphs() == 0
    assert backend.bytes_held() == 0
    with pytest.raises(RuntimeError, match="capturing is not allowed"), _in_context(M.FULL):
        wrapper(x)
    is_broken = False
    assert _captured(wrapper, backend, x).tolist() == [2.0] * 4
    is_broken = True
    with pytest.raises(Broken), _in_context(M.FULL):
        wrapper(x)  # the host backend runs the callable again
    is_broken = False
    with _in_context(M.FULL):
        assert wrapper(x).tolist() == [2.0] * 4


def test_capturing_is_not_reentrant_and_restores_the_collector() -> None:
    backend = HostGraphBackend()
    gc.disable()
    try:
        with backend.capturing():
            with pytest.raises(AssertionError), backend.capturing():
                pass
            assert backend.is_capturing_allowed
            with pytest.raises(AssertionError, match="while capturing"):
                backend.clear()
        assert not gc.isenabled()
    finally:
        gc.enable()


Pair = collections.namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Meta:
    lengths: torch.Tensor
    scale: float = 1.0


def _consume(x: torch.Tensor, nested: Any, *rest: torch.Tensor, scale: float = 1.0, **tables: Any) -> torch.Tensor:
    return x * scale


def _arguments() -> tuple[list[Any], dict[str, Any]]:
    nested = [torch.ones(2), {"keys": (torch.ones(3), Pair(torch.ones(1), torch.ones(1)))}, Meta(torch.ones(2))]
    return [torch.ones(4), nested, torch.ones(2)], {"scale": 1.0, "table": {"blocks": [torch.ones(2)]}}


MOVES: dict[str, Callable[[list[Any], dict[str, Any]], Any]] = {
    "x": lambda args, kwargs: args.__setitem__(0, torch.ones(4)),
    "nested[0]": lambda args, kwargs: args[1].__setitem__(0, torch.ones(2)),
    "nested[1]['keys'][0]": lambda args, kwargs: args[1][1].update(keys=(torch.ones(3), args[1][1]["keys"][1])),
    "nested[1]['keys'][1].right": lambda args, kwargs: args[1][1].update(
        keys=(args[1][1]["keys"][0], args[1][1]["keys"][1]._replace(right=torch.ones(1)))
    ),
    "nested[2].lengths": lambda args, kwargs: setattr(args[1][2], "lengths", torch.ones(2)),
    "args[2]": lambda args, kwargs: args.__setitem__(2, torch.ones(2)),
    "table['blocks'][0]": lambda args, kwargs: kwargs["table"]["blocks"].__setitem__(0, torch.ones(2)),
}


@pytest.mark.parametrize("name", list(MOVES))
def test_the_moved_argument_is_named(name: str) -> None:
    backend = HostGraphBackend()
    wrapper = CUDAGraphWrapper(_consume, M.PIECEWISE, backend, name="piece 3", debug_graph_inputs=True)
    args, kwargs = _arguments()
    keep_alive = _arguments()  # so that no new tensor lands on an old address
    _captured(wrapper, backend, *args, **kwargs)
    with _in_context(M.PIECEWISE):
        wrapper(*args, **kwargs)
        held = [*args], {**kwargs}
        MOVES[name](args, kwargs)
        with pytest.raises(RuntimeError) as caught:
            wrapper(*args, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"PIECEWISE graph of 4 tokens of piece 3: input {name!r} moved from 0x")
    assert "persistent buffer" in message
    assert keep_alive is not held


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda args, kwargs: kwargs.update(scale=2.0), "input 'scale' is 2.0, and the graph has 1.0 baked in"),
        (lambda args, kwargs: kwargs.update(scale=1), "input 'scale' is 1, and the graph has 1.0"),
        (lambda args, kwargs: setattr(args[1][2], "scale", 3.0), r"input 'nested\[2\].scale' is 3.0"),
        (lambda args, kwargs: kwargs.pop("table"), r"input \"table\['blocks'\]\[0\]\" was given at capture and is"),
        (lambda args, kwargs: kwargs.update(more=torch.ones(1)), "input 'more' was not given at capture"),
        (lambda args, kwargs: kwargs.update(scale=torch.ones(1)), "input 'scale' is a tensor in only one"),
        (lambda args, kwargs: args.pop(), r"input 'args\[2\]' was given at capture and is missing now"),
    ],
)
def test_other_changes_are_named_too(change: Any, match: str) -> None:
    backend = HostGraphBackend()
    wrapper = CUDAGraphWrapper(_consume, M.PIECEWISE, backend, debug_graph_inputs=True)
    args, kwargs = _arguments()
    _captured(wrapper, backend, *args, **kwargs)
    change(args, kwargs)
    with _in_context(M.PIECEWISE), pytest.raises(RuntimeError, match=match):
        wrapper(*args, **kwargs)


def test_without_the_switch_moved_inputs_are_not_looked_for() -> None:
    backend = HostGraphBackend()
    wrapper = CUDAGraphWrapper(_consume, M.PIECEWISE, backend)
    args, kwargs = _arguments()
    _captured(wrapper, backend, *args, **kwargs)
    fresh_args, fresh_kwargs = _arguments()
    with _in_context(M.PIECEWISE):
        assert wrapper(*fresh_args, **fresh_kwargs).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.ones(5), r"input 'x' has shape \(5,\), and was captured with shape \(4,\)"),
        (torch.ones(4, dtype=torch.float64), "input 'x' has dtype torch.float64"),
        (torch.ones(8)[::2], r"input 'x' has stride \(2,\)"),
    ],
)
def test_the_host_backend_always_refuses_other_shapes(x: torch.Tensor, match: str) -> None:
    backend = HostGraphBackend()
    wrapper = CUDAGraphWrapper(Double(), M.FULL, backend)
    # Double has __call__(self, x): its signature gives the name.
    _captured(wrapper, backend, torch.ones(4))
    with _in_context(M.FULL), pytest.raises(RuntimeError, match=match):
        wrapper(x)


def test_names_come_from_a_modules_forward_and_fall_back_to_positions() -> None:
    class Layer(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + 1

    backend = HostGraphBackend()
    cases: list[tuple[Callable[..., Any], str]] = [(Layer(), "hidden"), (torch.relu, r"args\[0\]")]
    for runnable, name in cases:
        wrapper = CUDAGraphWrapper(runnable, M.FULL, backend, debug_graph_inputs=True)
        x, moved = torch.ones(4), torch.ones(4)
        _captured(wrapper, backend, x)
        with _in_context(M.FULL), pytest.raises(RuntimeError, match=f"input '{name}' moved"):
            wrapper(moved)


def test_clear_drops_every_graph_of_the_backend() -> None:
    backend, counters = HostGraphBackend(), GraphCounters()
    wrappers = [CUDAGraphWrapper(Double(), mode, backend, counters=counters) for mode in (M.FULL, M.PIECEWISE)]
    x = torch.ones(4)
    for wrapper in wrappers:
        _captured(wrapper, backend, x)
    assert backend.bytes_held() > 0
    assert counters.num_graphs() == 2
    backend.clear()
    assert backend.bytes_held() == 0
    assert counters.num_graphs() == 0
    assert sum(entry.num_bytes for entry in counters.by_key().values()) == 0
    with _in_context(M.FULL), pytest.raises(RuntimeError, match="capturing is not allowed"):
        wrappers[0](x)
    assert _captured(wrappers[0], backend, x).tolist() == [2.0] * 4
    assert counters.by_key()[M.FULL, KNOWN].num_captures == 2


def test_discard_keeps_the_pool_until_its_last_graph_is_gone() -> None:
    backend = HostGraphBackend()
    wrapper = CUDAGraphWrapper(Double(), M.FULL, backend)
    for num_tokens in (8, 4):
        _captured(wrapper, backend, torch.ones(num_tokens), descriptor=BatchDescriptor(num_tokens, num_tokens))
    held = backend.bytes_held()
    assert held == 8 * 4
    backend.discard(M.FULL, BatchDescriptor(8, 8))
    assert backend.bytes_held() == held
    backend.discard(M.FULL, BatchDescriptor(4, 4))
    assert backend.bytes_held() == 0


def test_factory_follows_the_device() -> None:
    assert make_graph_backend(torch.device("cpu")).name == "host"
