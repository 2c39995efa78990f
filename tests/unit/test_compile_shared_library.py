"""NEEDED entries are read as the linker wrote them; a library with a C++ runtime of its own is refused."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from workers.compile.errors import UnlinkablePieceError
from workers.compile.shared_library import (
    CXX_RUNTIME,
    check_shared_cxx_runtime,
    needed_libraries,
    shared_runtime_compiler,
)

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")
SOURCE = '#include <locale>\n#include <string>\nextern "C" int answer() { return std::locale().name().size(); }\n'


def build(folder: Path, compiler: str, *flags: str) -> bytes:
    (folder / "answer.cpp").write_text(SOURCE)
    target = folder / "answer.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(folder / "answer.cpp"), "-o", str(target), *flags], check=True)
    return target.read_bytes()


@needs_compiler
def test_a_shared_runtime_is_found(tmp_path: Path) -> None:
    assert COMPILER is not None
    library = build(tmp_path, COMPILER)
    assert CXX_RUNTIME in needed_libraries(library)
    check_shared_cxx_runtime(library)


@needs_compiler
def test_a_static_runtime_is_refused(tmp_path: Path) -> None:
    assert COMPILER is not None
    library = build(tmp_path, COMPILER, "-static-libstdc++")
    with pytest.raises(UnlinkablePieceError, match="linked into it statically"):
        check_shared_cxx_runtime(library)


@needs_compiler
def test_the_wrapped_compiler_links_the_shared_runtime_where_only_an_archive_is_found(tmp_path: Path) -> None:
    """-static-libstdc++ makes the linker prefer the archive, as on a host that has nothing else."""
    importlib.import_module("torch")  # Brings the shared runtime into the process.
    with shared_runtime_compiler("g++") as compiler:
        assert subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        check_shared_cxx_runtime(build(tmp_path, compiler, "-static-libstdc++"))


@pytest.mark.parametrize("data", [b"", b"MZ", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + bytes(100)])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(UnlinkablePieceError):
        needed_libraries(data)
