"""The spare process: asked for once per node, seen by what its siblings are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.serving import spare


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Ray was asked, with the flag in a folder of the test."""
    calls: list[str] = []
    monkeypatch.setattr(spare, "_session_folder", lambda: tmp_path)
    monkeypatch.setattr(spare, "_want_and_give_up", lambda: calls.append("asked"))
    return calls


@pytest.mark.parametrize(
    ("siblings", "count"),
    [
        (["ray::ServeReplica:app:engine-m", "raylet"], 1),
        (["ray::ServeReplica:app:engine-m", "ray::IDLE"], 0),
        (["python /x/ray/_private/workers/default_worker.py --node-ip-address=1"], 0),
    ],
)
def test_a_node_gets_one_spare(
    siblings: list[str], count: int, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare, "_command_lines", lambda: siblings)
    assert not spare.wants_spare()
    spare._ask_for_spare()
    assert len(asked) == count
    assert spare.wants_spare(), "workers that start from now on prepare"


def test_a_node_without_a_spare_only_starts_more_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(spare, "_session_folder", lambda: tmp_path / "missing")
    monkeypatch.setattr(spare.logger, "exception", told.append)
    spare._ask_for_spare()
    assert told == ["no spare process on this node"]
    assert not spare.wants_spare()


_PRELOAD = """
import sys
from cluster.serving import spare
from workers.startup import cuda
spare.wants_spare, cuda.has_driver = (lambda: sys.argv[1] == "spare"), (lambda: True)
import cluster.serving.preload
if "workers.compile.prefetch" in sys.modules:
    sys.modules["workers.compile.prefetch"].wait_for_compiler(only_if_begun=True)
names = ("torch", "cluster.serving.replica", "torch._inductor.compile_fx")
print([name in sys.modules for name in names])
"""


@pytest.mark.parametrize("is_spare", [False, True])
def test_only_a_spare_imports_engine_and_compiler(is_spare: bool) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _PRELOAD, "spare" if is_spare else "other"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.splitlines()[-1] == str([is_spare] * 3)


def test_siblings_are_the_children_of_the_parent() -> None:
    own = Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    assert own in spare._command_lines()
