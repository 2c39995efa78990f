"""Builds the C++ kernels once per machine and loads them.

The sources need a compiler and nothing else: no headers of torch, so one build serves every torch version. The
library lands in a private folder of the cache under a name that says what it was made from; a machine without a
compiler uses a library that is already there, or none. Knows nothing of what the kernels compute.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from workers.checkpoint.cache import cache_root

logger = logging.getLogger(__name__)

_SOURCE_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-ffp-contract=fast")
_OPENMP_LIBRARY = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*")


class BuildError(Exception):
    """The kernels cannot be built or loaded here; the message says why."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if need be; None (after one warning) where that is not possible."""
    try:
        return ctypes.CDLL(str(build(cache_root() / "kernels")))
    except (BuildError, OSError) as error:
        logger.warning("CPU kernels are not available, falling back to plain torch (slower): %s", error)
        return None


def build(folder: Path) -> Path:
    """Path of the library for this machine in ``folder``, built first if it is not there.

    Safe to call from several processes at once: one builds, the others wait.

    Raises:
        BuildError: No compiler, it failed, or the folder is open to others.
    """
    if platform.system() != "Linux":
        raise BuildError(f"they are built on Linux only, and this is {platform.system()}")
    _make_private(folder)
    prefix = _digest(*(path.read_bytes() for path in _sources("*.h", "*.cpp")), *map(str.encode, _FLAGS), _cpu())
    compiler = _find_compiler()
    if compiler is None:
        ready = sorted(folder.glob(f"{prefix}-*.so"))
        if not ready:
            raise BuildError("no C++ compiler found; install g++ or clang++")
        return ready[0]
    target = folder / f"{prefix}-{_digest(_run([compiler, '--version']).encode())}.so"
    if not target.exists():
        with (folder / f"{prefix}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(compiler, target)
    return target


def _make_private(folder: Path) -> None:
    """A library is code: it must not be possible for others to put one there."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{folder} must belong to this user and be writable by nobody else")


def _sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in _SOURCE_FOLDER.glob(pattern))


def _digest(*parts: bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()[:16]


def _cpu() -> bytes:
    """What ``-march=native`` depends on: the processor's architecture, model and instruction sets."""
    wanted = ("model name", "flags", "Features", "CPU part")
    seen: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            seen.setdefault(name.strip(), value.strip())
    return repr((platform.machine(), sorted(seen.items()))).encode()


def _find_compiler() -> str | None:
    return next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


def _compile(compiler: str, target: Path) -> None:
    """Compile every source at once, link, and move the result into place."""
    logger.info("building the CPU kernels (once per machine)")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects, running = [], []
        for source in _sources("*.cpp"):
            objects.append(str(Path(scratch) / f"{source.stem}.o"))
            command = [compiler, *_FLAGS, "-c", str(source), "-o", objects[-1]]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        failures = [errors for process in running if (errors := process.communicate()[1]) and process.returncode]
        if failures:
            raise BuildError(f"{compiler} failed: {failures[0].strip()[:2000]}")
        library = Path(scratch) / target.name
        _run([compiler, "-shared", *objects, *_openmp_runtime(), "-o", str(library)])
        library.rename(target)


def _openmp_runtime() -> list[str]:
    """The OpenMP runtime that torch brought into this process, so that there is one team of threads, not two.

    Its file is named, not ``-lgomp``: wheels ship it under names of their own.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[1] + line.partition("/")[2]
        if _OPENMP_LIBRARY.fullmatch(Path(path).name):
            return [path]
    return ["-fopenmp"]


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{' '.join(command[:2])} failed: {result.stderr.strip()[:2000]}")
    return result.stdout
