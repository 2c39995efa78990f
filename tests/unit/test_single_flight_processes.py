"""Replicas that start cold together, as real processes that are really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

Processes = list[subprocess.Popen[str]]


@pytest.fixture
def processes() -> Iterator[Processes]:
    running: Processes = []
    yield running
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def start(processes: Processes, count: int, folder: Path, seconds: float, *leases: str) -> None:
    command = [sys.executable, "-m", "tests.flight_process", str(folder), str(seconds), *leases]
    for _ in range(count):
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))


def builders(folder: Path) -> list[int]:
    path = folder / "builds"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def wait_for_builders(folder: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while len(pids := builders(folder)) < count:
        assert time.monotonic() < deadline, f"{len(pids)} builds began instead of {count}"
        time.sleep(0.02)
    return pids


def outcomes(processes: Processes) -> tuple[list[str], set[str]]:
    """How each process came to its result, and the different results."""
    lines = []
    for process in processes:
        text, _ = process.communicate(timeout=60)
        if process.returncode == 0:
            lines.append(text.strip().split(" ", 1))
    return sorted(outcome for outcome, _ in lines), {value for _, value in lines}


def test_eight_cold_starts_make_one_build(tmp_path: Path, processes: Processes) -> None:
    start(processes, 8, tmp_path, 1.0)
    kinds, values = outcomes(processes)
    (builder,) = builders(tmp_path)
    assert len(kinds) == 8
    assert values == {f"made by {builder}"}
    assert kinds.count("built") == 1
    assert set(kinds) <= {"built", "waited", "found"}


def test_a_builder_that_is_killed_is_followed_by_one_more_build(tmp_path: Path, processes: Processes) -> None:
    start(processes, 8, tmp_path, 1.0)
    (victim,) = wait_for_builders(tmp_path, 1)
    os.kill(victim, signal.SIGKILL)
    kinds, values = outcomes(processes)
    first, second = builders(tmp_path)
    assert first == victim
    assert values == {f"made by {second}"}
    assert kinds.count("built") == 1
    assert len(kinds) == 7, "everybody but the victim is ready"


def test_a_builder_that_is_stopped_is_taken_over_and_cannot_publish(tmp_path: Path, processes: Processes) -> None:
    start(processes, 1, tmp_path, 0.5)
    (victim,) = wait_for_builders(tmp_path, 1)
    os.kill(victim, signal.SIGSTOP)
    start(processes, 2, tmp_path, 0.5)
    _, second = wait_for_builders(tmp_path, 2)
    os.kill(victim, signal.SIGCONT)
    assert outcomes(processes[:1])[1] == {f"made by {victim}"}, "it serves with what it built"
    assert outcomes(processes[1:])[1] == {f"made by {second}"}
    assert (tmp_path / "result").read_text() == f"made by {second}"


def test_two_clusters_on_one_store_with_leases_of_their_own(tmp_path: Path, processes: Processes) -> None:
    """Each builds once; what is published first is what everybody finds."""
    start(processes, 3, tmp_path, 0.8, str(tmp_path / "cluster-a"))
    start(processes, 3, tmp_path, 0.8, str(tmp_path / "cluster-b"))
    kinds, _ = outcomes(processes)
    assert len(kinds) == 6
    pids = builders(tmp_path)
    assert len(pids) <= 2
    assert (tmp_path / "result").read_text() in {f"made by {pid}" for pid in pids}
