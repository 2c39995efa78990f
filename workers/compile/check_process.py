"""The process that tries pieces: started, given a folder of work, waited for, and begun early where it will be needed.

Most of what a check takes are the process's own imports. A node that never started an engine of this configuration from
stored pieces will have to try them, so there the process is begun before the engine itself imports anything, and waits
for its work. Knows processes; what it tries, and what that says, is in :mod:`workers.compile.self_check`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from workers.artifacts.digest import canonical_json, sha256
from workers.artifacts.names import BUNDLES
from workers.artifacts.stores.factory import store_folder
from workers.checkpoint.cache import artifacts_root
from workers.config import ArtifactConfig, EngineConfig
from workers.startup.cuda import device_index, has_driver

logger = logging.getLogger(__name__)

_CHILD = "workers.compile.self_check_child"

_POLL_S = 0.02
#: Longest time that the process may take until it has imported what it needs.
_IMPORT_TIMEOUT_S = 300.0

_lock = threading.Lock()
_begun: CheckProcess | None = None


class CheckProcess:
    """Imports at once, then waits for the name of a folder on its standard input.

    Args:
        device: Where pieces will run; the process brings it up meanwhile.
    """

    def __init__(self, device: str) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", _CHILD, device],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )

    def run(self, folder: Path, timeout_s: float, has_begun: Callable[[], bool]) -> int | None:
        """Have it do the work in the folder.

        Args:
            timeout_s: Longest time after ``has_begun`` said yes: imports do not count.
            has_begun: Whether it runs what it shall try.

        Returns:
            Its exit status; None if it did not end in time.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its status tells
            self._process.stdin.write(f"{folder}\n".encode())
            self._process.stdin.close()
        deadline_s, counts = time.monotonic() + _IMPORT_TIMEOUT_S, False
        while time.monotonic() < deadline_s:
            try:
                return self._process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if not counts and has_begun():
                    deadline_s, counts = time.monotonic() + timeout_s, True
        return None

    def output(self) -> str:
        """What it wrote."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace").strip()

    def close(self) -> None:
        """End it, whatever it does."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._output.close()


@contextlib.contextmanager
def check_process(device: str) -> Iterator[CheckProcess]:
    """The process that was begun early, or one that begins now; ended afterwards."""
    process = _take() or CheckProcess(device)
    with contextlib.closing(process):
        yield process


@contextlib.contextmanager
def begun_early(config: EngineConfig) -> Iterator[None]:
    """While an engine starts: begin the process if its pieces will probably be tried, and end it if they are not."""
    global _begun
    if is_expected(config):
        with _lock:
            _begun = CheckProcess(_device(config))
    try:
        yield
    finally:
        not_needed()


def not_needed() -> None:
    """There is nothing to try: a process that was begun early need not go on importing."""
    if (unused := _take()) is not None:
        unused.close()


def is_wanted(config: ArtifactConfig) -> bool:
    """Whether pieces are tried: not where nothing comes from a store."""
    return config.store is not None and config.self_check != "off"


def is_expected(config: EngineConfig) -> bool:
    """Whether this node, as far as can be told without torch, has yet to try the pieces of this configuration."""
    return _tries_pieces(config) and _may_hold_bundles(config.artifacts) and not _note(config).exists()


def note_started(config: EngineConfig) -> None:
    """This node has started from stored pieces of this configuration."""
    if not _tries_pieces(config):
        return
    try:
        _note(config).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _note(config).touch(mode=0o600)
    except OSError as error:
        logger.debug("not noted: %s", error)


def _take() -> CheckProcess | None:
    global _begun
    with _lock:
        process, _begun = _begun, None
    return process


def _device(config: EngineConfig) -> str:
    """Where the engine will run, as far as can be told without torch."""
    index = device_index(config.device)
    return "cpu" if index is None or not has_driver() else f"cuda:{index}"


def _tries_pieces(config: EngineConfig) -> bool:
    device_type = _device(config).partition(":")[0]
    return config.compiles_pieces(device_type) and is_wanted(config.artifacts)


def _may_hold_bundles(config: ArtifactConfig) -> bool:
    """False only for a folder that holds none; others are not asked."""
    assert config.store is not None
    root = store_folder(config.store, artifacts_root())
    return root is None or (root / BUNDLES).is_dir()


def _note(config: EngineConfig) -> Path:
    """There once an engine of this configuration has started from stored pieces; another torch may have others."""
    versions = importlib.metadata.version("torch"), sys.version
    digest = sha256(canonical_json([config.model_dump(mode="json"), *versions]))
    return artifacts_root() / "started" / digest
