"""What a built shared library needs from the host, and a compiler that links the C++ runtime as a shared one.

A library with a C++ runtime of its own inside (libstdc++ linked statically, as happens on hosts that have only the
static archive) crashes in a process that has the shared one, at the first use of a locale. Knows ELF headers and one
compiler flag; nothing of what the libraries compute.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from workers.compile.errors import UnlinkablePieceError

CXX_RUNTIME = "libstdc++.so.6"

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


def needed_libraries(library: bytes) -> list[str]:
    """The NEEDED entries of a 64-bit little-endian ELF library (System V ABI, chapter 5).

    Raises:
        UnlinkablePieceError: It is no such library.
    """
    if library[:6] != b"\x7fELF\x02\x01":
        raise UnlinkablePieceError("A built piece is not a 64-bit little-endian ELF library.")
    try:
        segments = list(_segments(library))
        start, size = next((offset, size) for kind, offset, _, size in segments if kind == _PT_DYNAMIC)
        entries = list(_dynamic_entries(library[start : start + size]))
        table = next(value for tag, value in entries if tag == _DT_STRTAB)
        strings = next(
            offset + table - address
            for kind, offset, address, size in segments
            if kind == _PT_LOAD and address <= table < address + size
        )
        return [_string(library, strings + value) for tag, value in entries if tag == _DT_NEEDED]
    except (struct.error, StopIteration, ValueError) as error:
        raise UnlinkablePieceError("A built piece has no readable dynamic section.") from error


def check_shared_cxx_runtime(library: bytes) -> None:
    """Refuse a library that brings a C++ runtime of its own.

    Raises:
        UnlinkablePieceError: libstdc++ is not among the libraries that it needs.
    """
    needed = needed_libraries(library)
    if CXX_RUNTIME not in needed:
        raise UnlinkablePieceError(
            f"A built piece does not need {CXX_RUNTIME}, so the C++ runtime was linked into it statically and loading"
            f" it would crash; it needs {', '.join(needed) or 'nothing'}."
        )


def loaded_cxx_runtime() -> Path | None:
    """The C++ runtime that torch brought into this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.partition("/")[1] + line.partition("/")[2])
        if path.name.startswith(CXX_RUNTIME):
            return path
    return None


@contextlib.contextmanager
def shared_runtime_compiler(compiler: str) -> Iterator[str]:
    """A compiler that links the process's own shared C++ runtime, whatever the host's linker would find.

    The runtime is named by its file before the implicit ``-lstdc++``, so that nothing is left for a static archive to
    resolve.

    Yields:
        Path of the compiler; valid inside the ``with`` block.
    """
    runtime, real = loaded_cxx_runtime(), shutil.which(compiler)
    if runtime is None or real is None:
        yield compiler
        return
    with tempfile.TemporaryDirectory(prefix="warmgraph-cxx-") as folder:
        script = Path(folder) / Path(real).name
        link = shlex.join(["-Wl,--push-state,--no-as-needed", str(runtime), "-Wl,--pop-state"])
        script.write_text(
            "#!/bin/sh\n"
            'for arg in "$@"; do\n'
            f'  if [ "$arg" = -shared ]; then exec {shlex.quote(real)} "$@" {link}; fi\n'
            "done\n"
            f'exec {shlex.quote(real)} "$@"\n'
        )
        script.chmod(0o700)
        yield str(script)


def _segments(library: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(type, file offset, address, size in the file) of every program header."""
    (table,) = struct.unpack_from("<Q", library, 32)
    entry_size, count = struct.unpack_from("<HH", library, 54)
    for index in range(count):
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", library, table + index * entry_size)
        yield kind, offset, address, size


def _dynamic_entries(section: bytes) -> Iterator[tuple[int, int]]:
    for tag, value in struct.iter_unpack("<qQ", section[: len(section) // 16 * 16]):
        if tag == _DT_NULL:
            return
        yield tag, value


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
