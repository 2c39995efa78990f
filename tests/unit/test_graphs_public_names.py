"""The names that other parts build on, with exactly the parameters they were promised."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import workers.compile
import workers.graphs
from workers.graphs import (
    AttentionCGSupport,
    BatchDescriptor,
    CUDAGraphMode,
    CUDAGraphWrapper,
    GraphDispatcher,
    default_capture_sizes,
    resolve_mode,
)

_REQUIRED = inspect.Parameter.empty


def _positional(function: Any) -> dict[str, Any]:
    """Parameters that can be given by position, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name != "self"
    }


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (BatchDescriptor, {"num_tokens": _REQUIRED, "num_reqs": None, "uniform": False}),
        (
            default_capture_sizes,
            {
                "max_num_seqs": _REQUIRED,
                "max_num_batched_tokens": _REQUIRED,
                "query_len": 1,
                "sizes": None,
                "max_size": None,
            },
        ),
        (
            resolve_mode,
            {
                "requested": _REQUIRED,
                "compile_mode": _REQUIRED,
                "support": _REQUIRED,
                "attention_is_split": _REQUIRED,
                "query_len": 1,
            },
        ),
        (GraphDispatcher, {"mode": _REQUIRED, "sizes": _REQUIRED, "max_num_seqs": _REQUIRED, "query_len": 1}),
        (GraphDispatcher.dispatch, {"num_reqs": _REQUIRED, "num_tokens": _REQUIRED, "uniform_query_len": None}),
        (GraphDispatcher.capture_order, {}),
        (GraphDispatcher.mark_captured, {"mode": _REQUIRED, "descriptor": _REQUIRED}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_parameters(function: Any, parameters: dict[str, Any]) -> None:
    assert list(_positional(function).items()) == list(parameters.items())


def test_results() -> None:
    assert default_capture_sizes(2, 100) == [1, 2, 4]
    dispatcher = GraphDispatcher(CUDAGraphMode.FULL, [1, 2], 2)
    for mode, descriptor in dispatcher.capture_order():
        dispatcher.mark_captured(mode, descriptor)
    assert dispatcher.dispatch(1, 2) == (CUDAGraphMode.FULL, BatchDescriptor(2, 2))
    mode = resolve_mode(
        CUDAGraphMode.FULL, workers.compile.CompilationMode.NONE, AttentionCGSupport.UNIFORM_BATCH, False
    )
    assert mode is CUDAGraphMode.FULL_DECODE_ONLY


def test_every_public_name_is_there() -> None:
    for module in (workers.graphs, workers.compile):
        for name in module.__all__:
            assert getattr(module, name) is not None
    assert list(inspect.signature(CUDAGraphWrapper).parameters)[:3] == ["runnable", "runtime_mode", "backend"]
    assert {"CompilationMode", "support_torch_compile"} <= set(workers.compile.__all__)
    with pytest.raises(AttributeError):
        workers.graphs.NoSuchName  # noqa: B018
