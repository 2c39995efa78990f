"""Building and loading the native kernels: once per machine, safely, or not at all."""

from __future__ import annotations

import ctypes
import logging
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from workers.kernels import native

pytestmark = pytest.mark.skipif(native._find_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels that take no time to build."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(native, "_SOURCE_FOLDER", source)
    return source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels"


@pytest.mark.usefixtures("small_source")
def test_builds_once_into_a_private_folder(folder: Path) -> None:
    path = native.build(folder)
    assert ctypes.CDLL(str(path)).answer() == 42
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    built = path.stat().st_mtime_ns
    assert native.build(folder) == path
    assert path.stat().st_mtime_ns == built
    assert sorted(entry.suffix for entry in folder.iterdir()) == [".lock", ".so"]


def test_another_source_is_another_library(small_source: Path, folder: Path) -> None:
    before = native.build(folder)
    (small_source / "one.cpp").write_text('extern "C" int answer() { return 43; }')
    after = native.build(folder)
    assert before != after
    assert ctypes.CDLL(str(after)).answer() == 43


def test_another_processor_is_another_library(
    small_source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = native.build(folder)
    monkeypatch.setattr(native, "_cpu", lambda: b"another")
    assert native.build(folder) != before


def test_many_at_once_build_once(small_source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Path] = []
    compile_once = native._compile

    def counting(compiler: str, target: Path) -> None:
        compiled.append(target)
        compile_once(compiler, target)

    monkeypatch.setattr(native, "_compile", counting)
    threads = [threading.Thread(target=native.build, args=(folder,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1


@pytest.mark.usefixtures("small_source")
def test_without_a_compiler_takes_what_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.build(folder)
    monkeypatch.setattr(native, "_find_compiler", lambda: None)
    assert native.build(folder) == path
    path.unlink()
    with pytest.raises(native.BuildError, match="install g"):
        native.build(folder)


def test_a_compile_error_is_reported_and_leaves_nothing(small_source: Path, folder: Path) -> None:
    (small_source / "one.cpp").write_text("int nonsense(")
    with pytest.raises(native.BuildError, match="nonsense"):
        native.build(folder)
    assert not list(folder.glob("*.so"))


@pytest.mark.usefixtures("small_source")
def test_a_folder_that_others_can_write_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(native.BuildError, match="writable by nobody else"):
        native.build(folder)


def test_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(folder: Path) -> Path:
        raise native.BuildError("no C++ compiler found")

    monkeypatch.setattr(native, "build", fail)
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.library() is None
            assert native.library() is None
        assert [record.message for record in caplog.records] == [
            "CPU kernels are not available, falling back to plain torch (slower): no C++ compiler found"
        ]
    finally:
        native.library.cache_clear()


def test_there_is_one_openmp_runtime() -> None:
    """Torch's threads and the kernels' are one team: a second runtime would be a second team on the same cores."""
    program = (
        "import pathlib, re, torch; from workers.kernels import native; assert native.library()\n"
        "maps = pathlib.Path('/proc/self/maps').read_text()\n"
        r"print(len(set(re.findall(r'/\S*lib(?:gomp|iomp5|omp)\b\S*', maps))))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"
