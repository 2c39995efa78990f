"""Failures of the machine are told from failures of the compiler, and only the latter are held against anybody."""

from __future__ import annotations

import concurrent.futures.process
import errno
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compile_cases import MIXING_OPS, MixingModel, mixing_inputs
from workers.artifacts.errors import StoreError
from workers.artifacts.library import ArtifactLibrary
from workers.compile import CompiledModel, compile_model
from workers.compile.errors import BuildFailedError
from workers.compile.formats.fx_code import FxFormat
from workers.compile.key import bundle_key
from workers.compile.transient import is_transient
from workers.config import ArtifactConfig, CompilationConfig

CONFIG = CompilationConfig(mode="VLLM_COMPILE", piece_format="fx")
KEY = bundle_key(CONFIG, torch.device("cpu"), {"x_TE": 0}, splitting_ops=MIXING_OPS, graph={"model": "mixing"})


class _InductorError(RuntimeError):
    """Keeps what it was raised for as Dynamo's and Inductor's errors do."""

    def __init__(self, inner: Exception) -> None:
        super().__init__("backend='inductor' raised")
        self.inner_exception = inner


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
        OSError(errno.EMFILE, "Too many open files"),
        MemoryError(),
        TimeoutError("the store"),
        StoreError("cannot be reached"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("C++ compile error\n\ng++: fatal error: Killed signal terminated program cc1plus"),
        RuntimeError("/usr/bin/ld: final link failed: No space left on device"),
        subprocess.CalledProcessError(-9, ["ptxas"]),
        concurrent.futures.process.BrokenProcessPool("A child process terminated abruptly"),
        _InductorError(OSError(errno.ENOSPC, "No space left on device")),
    ],
    ids=repr,
)
def test_what_passes(error: Exception) -> None:
    assert is_transient(error)
    outer = RuntimeError("around it")
    outer.__cause__ = error
    assert is_transient(outer)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("ptxas ran out of registers"),
        OSError(errno.ENOENT, "No such file or directory: 'g++'"),
        PermissionError(errno.EACCES, "Permission denied"),
        subprocess.CalledProcessError(1, ["g++"]),
        # The compiler crashed on this code and will do so again.
        subprocess.CalledProcessError(-11, ["ptxas"]),
        NotImplementedError("no lowering"),
        _InductorError(AssertionError("inner")),
    ],
    ids=repr,
)
def test_what_stays(error: Exception) -> None:
    assert not is_transient(error)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMGRAPH_ARTIFACTS", str(tmp_path / "artifacts"))


def library() -> ArtifactLibrary:
    return ArtifactLibrary.from_config(ArtifactConfig(self_check="off"))


def start(found: ArtifactLibrary) -> CompiledModel:
    return compile_model(
        MixingModel(2), CONFIG, {"x_TE": mixing_inputs()}, splitting_ops=MIXING_OPS, library=found, key=KEY
    )


def raising(error: BaseException) -> Any:
    def fail(*args: Any) -> Any:
        raise error

    return fail


def test_a_full_disk_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library()
    with monkeypatch.context() as patch:
        patch.setattr(FxFormat, "build", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(BuildFailedError, match="not remembered: OSError"):
            start(found)
    assert (found.counters.num_build_failures, found.recent_failure(KEY)) == (0, None)
    assert not start(found).report.is_warm
    assert start(found).report.is_warm


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_who_is_interrupted_has_not_failed(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library()
    with monkeypatch.context() as patch:
        patch.setattr(FxFormat, "build", raising(error))
        with pytest.raises(type(error)):
            start(found)
    assert found.recent_failure(KEY) is None
    assert start(found).report.num_unique_pieces == 3


def test_pieces_that_cannot_be_loaded_for_want_of_memory_are_not_put_in_quarantine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start(library())
    found = library()
    with monkeypatch.context() as patch:
        patch.setattr(FxFormat, "load", raising(MemoryError("no memory")))
        with pytest.raises(BuildFailedError, match="Loading failed for want of something on this machine: MemoryError"):
            start(found)
    assert found.marks.quarantined() == []
    assert start(library()).report.is_warm
