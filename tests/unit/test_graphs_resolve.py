"""Mode resolution: the whole table, against rules written as the contract states them."""

from __future__ import annotations

import itertools
import logging

import pytest

from workers.errors import ConfigError
from workers.graphs import AttentionCGSupport, CompilationMode, CUDAGraphMode, resolve_mode, resolve_mode_with_reason

M, S, C = CUDAGraphMode, AttentionCGSupport, CompilationMode


@pytest.mark.parametrize(
    ("requested", "compile_mode", "support", "is_split", "query_len", "expected"),
    [
        # Supported as asked.
        (M.NONE, C.NONE, S.NEVER, False, 1, M.NONE),
        (M.FULL, C.NONE, S.ALWAYS, False, 1, M.FULL),
        (M.FULL, C.VLLM_COMPILE, S.ALWAYS, True, 4, M.FULL),
        (M.PIECEWISE, C.VLLM_COMPILE, S.NEVER, True, 1, M.PIECEWISE),
        (M.FULL_DECODE_ONLY, C.NONE, S.UNIFORM_SINGLE_TOKEN_DECODE, False, 1, M.FULL_DECODE_ONLY),
        (M.FULL_DECODE_ONLY, C.NONE, S.UNIFORM_BATCH, False, 3, M.FULL_DECODE_ONLY),
        (M.FULL_AND_PIECEWISE, C.VLLM_COMPILE, S.UNIFORM_SINGLE_TOKEN_DECODE, True, 1, M.FULL_AND_PIECEWISE),
        # Mixed FULL without ALWAYS.
        (M.FULL, C.VLLM_COMPILE, S.UNIFORM_BATCH, True, 1, M.FULL_AND_PIECEWISE),
        (M.FULL, C.VLLM_COMPILE, S.UNIFORM_BATCH, False, 1, M.FULL_DECODE_ONLY),
        (M.FULL, C.NONE, S.UNIFORM_SINGLE_TOKEN_DECODE, False, 1, M.FULL_DECODE_ONLY),
        # FULL decode with NEVER.
        (M.FULL_AND_PIECEWISE, C.VLLM_COMPILE, S.NEVER, True, 1, M.PIECEWISE),
        (M.FULL_DECODE_ONLY, C.VLLM_COMPILE, S.NEVER, True, 1, M.PIECEWISE),
        (M.FULL_DECODE_ONLY, C.VLLM_COMPILE, S.NEVER, False, 1, M.NONE),
        (M.FULL_AND_PIECEWISE, C.NONE, S.NEVER, True, 1, M.NONE),
        # FULL decode of several tokens per request.
        (M.FULL_AND_PIECEWISE, C.VLLM_COMPILE, S.UNIFORM_SINGLE_TOKEN_DECODE, True, 2, M.PIECEWISE),
        (M.FULL_DECODE_ONLY, C.VLLM_COMPILE, S.UNIFORM_SINGLE_TOKEN_DECODE, True, 2, M.PIECEWISE),
        (M.FULL_DECODE_ONLY, C.NONE, S.UNIFORM_SINGLE_TOKEN_DECODE, False, 2, M.NONE),
        # PIECEWISE needs compile mode 3.
        (M.PIECEWISE, C.NONE, S.ALWAYS, True, 1, M.NONE),
        (M.PIECEWISE, C.STOCK_TORCH_COMPILE, S.ALWAYS, True, 1, M.NONE),
        (M.FULL_AND_PIECEWISE, C.NONE, S.ALWAYS, True, 1, M.FULL_DECODE_ONLY),
        (M.FULL_AND_PIECEWISE, C.DYNAMO_TRACE_ONCE, S.UNIFORM_BATCH, False, 1, M.FULL_DECODE_ONLY),
        # Two steps: FULL to FULL_AND_PIECEWISE, which has no pieces to capture.
        (M.FULL, C.NONE, S.UNIFORM_BATCH, True, 1, M.FULL_DECODE_ONLY),
        # Without the split there are no regions between attention ops.
        (M.PIECEWISE, C.VLLM_COMPILE, S.ALWAYS, False, 1, M.NONE),
        (M.FULL_AND_PIECEWISE, C.VLLM_COMPILE, S.ALWAYS, False, 1, M.FULL_DECODE_ONLY),
    ],
)
def test_resolution(
    requested: CUDAGraphMode,
    compile_mode: CompilationMode,
    support: AttentionCGSupport,
    is_split: bool,
    query_len: int,
    expected: CUDAGraphMode,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        mode = resolve_mode(requested, compile_mode, support, is_split, query_len)
    assert mode is expected
    assert len(caplog.records) == (mode is not requested)
    if mode is not requested:
        assert f"cudagraph_mode {requested.name} becomes {expected.name}: " in caplog.text


@pytest.mark.parametrize(("compile_mode", "is_split"), list(itertools.product(C, [True, False])))
def test_full_with_never_is_an_error(compile_mode: CompilationMode, is_split: bool) -> None:
    with pytest.raises(ConfigError, match="set cudagraph_mode to PIECEWISE") as caught:
        resolve_mode(M.FULL, compile_mode, S.NEVER, is_split)
    assert caught.value.param == "cudagraph_mode"


@pytest.mark.parametrize("requested", list(M))
def test_every_resolution_can_run(requested: CUDAGraphMode) -> None:
    for setting in itertools.product(C, S, [True, False], [1, 2, 5]):
        compile_mode, support, is_split, query_len = setting
        if requested is M.FULL and support is S.NEVER:
            continue
        resolution = resolve_mode_with_reason(requested, *setting)
        mode = resolution.mode
        assert resolution.requested is requested
        assert (resolution.reason is None) == (mode is requested)
        if mode.mixed_mode() is M.FULL:
            assert support is S.ALWAYS
        if mode.decode_mode() is M.FULL:
            assert support >= (S.UNIFORM_BATCH if query_len > 1 else S.UNIFORM_SINGLE_TOKEN_DECODE)
        if mode.has_piecewise():
            assert compile_mode is C.VLLM_COMPILE
            assert is_split
        # Resolving again changes nothing, and full graphs appear only where they were asked for.
        assert resolve_mode_with_reason(mode, *setting).mode is mode
        assert requested.has_full() or not mode.has_full()
        assert mode is M.NONE or requested is not M.NONE


def test_one_reason_names_every_step() -> None:
    reason = resolve_mode_with_reason(M.FULL, C.NONE, S.UNIFORM_BATCH, True).reason
    assert reason is not None
    assert reason.count("; ") == 1
    assert "support ALWAYS, this one has UNIFORM_BATCH" in reason
    assert "need compilation mode 3, this is mode 0" in reason
