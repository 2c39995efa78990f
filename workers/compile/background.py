"""Builds another format of a running model's pieces in a process of its own, after the replica is ready.

The slow format, AOTInductor, must never delay anybody: it is built beside the serving process, at the lowest priority,
by a child that shares nothing with it but a folder. Knows processes and folders; the work is
:mod:`workers.compile.build_worker`'s.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from workers.artifacts.digest import sha256
from workers.compile.build_worker import BLOBS, PLAN, REQUEST, RESULT
from workers.compile.errors import BuildFailedError
from workers.compile.piece_set import PieceSet
from workers.compile.plan import Plan

logger = logging.getLogger(__name__)

_LOG = "log.txt"
_CHILD = "workers.compile.build_worker"


class BackgroundBuild:
    """One build, begun on construction. It ends with this process.

    On CUDA the child takes a context on the device, and tuning, where sizes are tuned, runs kernels on it.

    Args:
        pieces: Of the running model.
        piece_format: What to build.
        sizes: Of the dynamic dimension, None standing for every size; by default those of the plan's other builds.

    Raises:
        RefusedError: The pieces' sources are missing or damaged.
        StoreError: The store is in trouble.
    """

    def __init__(
        self, pieces: PieceSet, piece_format: str = "aoti", *, sizes: Sequence[int | None] | None = None
    ) -> None:
        self._pieces, self._piece_format = pieces, piece_format
        sources = pieces.sources()
        self._scratch = tempfile.TemporaryDirectory(prefix="warmgraph-build-")
        self._folder = Path(self._scratch.name)
        (self._folder / BLOBS).mkdir(mode=0o700)
        for key, source in sources.items():
            (self._folder / BLOBS / key).write_bytes(source)
        request = {"piece_format": piece_format, "sizes": list(pieces.plan.sizes() if sizes is None else sizes)}
        (self._folder / REQUEST).write_text(json.dumps(request))
        (self._folder / PLAN).write_text(pieces.plan.to_json())
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with (self._folder / _LOG).open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _CHILD, str(self._folder)],
                # Its end tells the child that we are gone.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # One thing at a time: what is in no hurry must not take every core either.
                env=environment | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
                # A group of its own, for the compilers that it starts.
                start_new_session=True,
            )
        logger.info("building %s pieces in process %d", piece_format, self._process.pid)

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def poll(self) -> PieceSet | None:
        """What was built, ready to be published; None while the child is at work. To be asked until it is not None.

        Raises:
            BuildFailedError: It failed; the message has the last line that it wrote.
        """
        return None if self._process.poll() is None else self.wait()

    def wait(self, timeout_s: float | None = None) -> PieceSet:
        """:meth:`poll` once the child has ended.

        Raises:
            BuildFailedError: It failed.
            subprocess.TimeoutExpired: It did not end in time; it goes on.
        """
        self._process.wait(timeout_s)
        try:
            if self._process.returncode != 0:
                lines = (self._folder / _LOG).read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
                raise BuildFailedError(f"Building in the background failed ({self._process.returncode}): {lines[-1]}")
            return self._result()
        finally:
            self._close()

    def stop(self) -> None:
        """End the child and its compilers, whatever they are doing."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close()

    def _result(self) -> PieceSet:
        plan = Plan.from_json((self._folder / RESULT).read_bytes())
        built = dataclasses.replace(self._pieces, plan=plan, piece_format=self._piece_format, is_warm=False, blobs={})
        for build in built.builds(plan.sizes()):
            path = self._folder / BLOBS / build.sha256
            if path.exists():
                data = path.read_bytes()
                assert sha256(data) == build.sha256
                built.blobs[build.sha256] = data
        return built

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._scratch.cleanup()
