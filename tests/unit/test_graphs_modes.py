"""Modes, descriptors and the forward context."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from workers.graphs import (
    BatchDescriptor,
    CompilationMode,
    CUDAGraphMode,
    ForwardContext,
    get_forward_context,
    is_forward_context_available,
    set_forward_context,
)

M = CUDAGraphMode

MODE_TABLE = {
    # mode: (decode, mixed, has full, has piecewise, is a runtime mode)
    M.NONE: (M.NONE, M.NONE, False, False, True),
    M.PIECEWISE: (M.PIECEWISE, M.PIECEWISE, False, True, True),
    M.FULL: (M.FULL, M.FULL, True, False, True),
    M.FULL_DECODE_ONLY: (M.FULL, M.NONE, True, False, False),
    M.FULL_AND_PIECEWISE: (M.FULL, M.PIECEWISE, True, True, False),
}


def test_mode_table_is_complete() -> None:
    assert set(MODE_TABLE) == set(M)


@pytest.mark.parametrize("mode", list(M))
def test_mode_halves(mode: CUDAGraphMode) -> None:
    decode, mixed, has_full, has_piecewise, is_runtime = MODE_TABLE[mode]
    assert mode.decode_mode() is decode
    assert mode.mixed_mode() is mixed
    assert mode.has_full() is has_full
    assert mode.has_piecewise() is has_piecewise
    assert mode.is_valid_runtime_mode() is is_runtime
    assert mode.separate_routine() is not is_runtime
    assert (mode in M.valid_runtime_modes()) is is_runtime


def test_compilation_mode_has_both_spellings() -> None:
    assert CompilationMode["PIECEWISE_COMPILE"] is CompilationMode["VLLM_COMPILE"]
    assert [int(mode) for mode in CompilationMode] == [0, 1, 2, 3]


def test_descriptor_is_a_key() -> None:
    assert BatchDescriptor(8) == BatchDescriptor(num_tokens=8, num_reqs=None, uniform=False)
    keys = {BatchDescriptor(8), BatchDescriptor(8, 8), BatchDescriptor(8, 8, True), BatchDescriptor(8, 4, True)}
    assert len(keys) == 4
    with pytest.raises(AttributeError):
        BatchDescriptor(8).num_tokens = 9  # type: ignore[misc]


def _context(mode: CUDAGraphMode = M.NONE, descriptor: BatchDescriptor | None = None) -> ForwardContext:
    return ForwardContext(None, None, (), cudagraph_runtime_mode=mode, batch_descriptor=descriptor)


def test_context_restores_the_previous_one_after_an_exception() -> None:
    outer, inner = _context(), _context(M.FULL, BatchDescriptor(4, 4))
    assert not is_forward_context_available()
    with set_forward_context(outer):
        with contextlib.suppress(KeyError), set_forward_context(inner):
            assert get_forward_context() is inner
            raise KeyError
        assert get_forward_context() is outer
    assert not is_forward_context_available()
    with pytest.raises(AssertionError):
        get_forward_context()


def test_context_refuses_what_one_batch_cannot_run_in() -> None:
    with pytest.raises(AssertionError, match="not a runtime mode"):
        _context(M.FULL_AND_PIECEWISE, BatchDescriptor(4))
    with pytest.raises(AssertionError, match="needs a batch descriptor"):
        _context(M.PIECEWISE)


def test_bookkeeping_does_not_import_torch() -> None:
    code = "import sys, workers.graphs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
