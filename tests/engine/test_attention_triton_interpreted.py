"""The Triton attention kernels on the CPU, through Triton's interpreter.

``TRITON_INTERPRET`` acts when a kernel is defined and holds for the whole process, so the cases run in a child.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parents[2]
CASES = "tests/engine/triton_interpreted_cases.py"


def test_kernels_in_the_interpreter() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "pytest", CASES, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " passed" in child.stdout
