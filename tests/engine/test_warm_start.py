"""A start with compiled pieces: cold, warm, waiting for another replica's build, and with a store that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_checkpoint
from workers import EngineConfig, SamplingParams
from workers.artifacts.errors import StoreError
from workers.artifacts.stores.directory import DirectoryStore
from workers.engine.engine import Engine
from workers.leases.base import Lease, LeaseService
from workers.leases.memory import MemoryLeases

PROMPT = [5, 6, 7, 8, 9]


def make_config(store: Path | None, **artifacts: Any) -> EngineConfig:
    return EngineConfig.create(
        model=str(tiny_checkpoint("llama")),
        dtype="float32",
        device="cpu",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        skip_tokenizer_init=True,
        compilation_config={"mode": "VLLM_COMPILE", "piece_format": "fx"},
        artifacts={"store": None if store is None else str(store), "self_check": "off", **artifacts},
    )


def finish(engine: Engine, request_id: str) -> list[int]:
    tokens = []
    while engine.has_unfinished:
        tokens += [token for chunk in engine.step() if chunk.request_id == request_id for token in chunk.token_ids]
    return tokens


def generate(engine: Engine, num_tokens: int = 16) -> list[int]:
    engine.add_request("r", PROMPT, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))
    return finish(engine, "r")


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return generate(Engine(make_config(None).model_copy(update={"enforce_eager": True})), 400)


@pytest.fixture(scope="module")
def warm_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by an engine whose account is checked in passing."""
    store = tmp_path_factory.mktemp("store")
    report = Engine(make_config(store)).startup_report()
    names = [phase.name for phase in report.phases]
    assert {"artifacts", "find", "single flight", "build", "trace", "load"} <= set(names)
    assert sum(name.startswith("piece ") for name in names) == 3
    (lookup,) = report.lookups
    assert not lookup.is_hit
    assert lookup.reason
    return store


def test_a_warm_start_builds_nothing_and_says_what_it_saved(warm_store: Path, expected: list[int]) -> None:
    engine = Engine(make_config(warm_store))
    report = engine.startup_report()
    names = {phase.name for phase in report.phases}
    assert {"artifacts", "fetch, verify", "load"} <= names
    assert not {"build", "trace", "single flight"} & names
    (lookup,) = report.lookups
    assert lookup.is_hit
    assert lookup.num_bytes > 0
    assert report.saved_s > 0
    assert engine.runner.artifact_warm
    assert generate(engine) == expected[:16]


def test_an_eager_model_serves_until_pieces_arrive_and_drops_no_request(
    tmp_path: Path, warm_store: Path, expected: list[int]
) -> None:
    leases = MemoryLeases()
    store = tmp_path / "store"
    config = make_config(store, serve_meanwhile=True)
    other = leases.acquire(Engine(make_config(warm_store)).runner.bundle_key.digest, "another replica")
    assert isinstance(other, Lease)
    engine = Engine(config, leases=leases)
    assert not engine.runner.artifact_warm
    assert engine.startup_report().swapped_s is None
    engine.add_request("r", PROMPT, SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
    tokens = [token for _ in range(8) for chunk in engine.step() for token in chunk.token_ids]
    assert tokens == expected[:8], "served eagerly"
    copy_store(warm_store, store)
    leases.release(other)
    deadline = time.monotonic() + 60
    while not engine.runner._serving._has_arrived():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    tokens += finish(engine, "r")
    assert tokens == expected
    report = engine.startup_report()
    assert report.swapped_s is not None
    assert report.ready_s is not None
    assert report.ready_s < report.swapped_s
    assert [lookup.is_hit for lookup in report.lookups] == [True]
    assert engine.runner.artifact_warm


def copy_store(source: Path, target: Path) -> None:
    """As if another replica had published."""
    for path in source.rglob("*"):
        if path.is_file() and "leases" not in path.parts:
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())


def test_a_hit_is_not_served_eagerly_first(warm_store: Path) -> None:
    engine = Engine(make_config(warm_store, serve_meanwhile=True))
    assert engine.runner.artifact_warm
    assert engine.startup_report().swapped_s is None


class Absent(MemoryLeases):
    """A lease service whose every lease is with somebody who never finishes."""

    def acquire(self, name: str, owner: str) -> Any:
        super().acquire(name, "somebody")
        return super().acquire(name, owner)


def test_after_the_deadline_a_replica_builds_for_itself(tmp_path: Path, expected: list[int]) -> None:
    leases: LeaseService = Absent()
    engine = Engine(make_config(tmp_path, build_wait_s=0.2), leases=leases)
    (flight,) = [phase for phase in engine.startup_report().phases if phase.name == "single flight"]
    assert flight.note.startswith("alone: somebody did not finish within 0.2 s")
    assert generate(engine) == expected[:16]


def no_space(self: DirectoryStore, name: str, data: bytes) -> bool:
    raise StoreError("No space left on device")


def test_a_full_store_keeps_nobody_from_starting(
    tmp_path: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DirectoryStore, "put_if_absent", no_space)
    engine = Engine(make_config(tmp_path))
    (flight,) = [phase for phase in engine.startup_report().phases if phase.name == "single flight"]
    assert flight.note == "built: the store did not take it"
    assert generate(engine) == expected[:16]


def test_a_disk_that_is_really_full_keeps_nobody_from_starting(tmp_path: Path, expected: list[int]) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        (tmp_path / "filler").write_bytes(b"x" * 12288)
        assert generate(Engine(make_config(tmp_path / "store"))) == expected[:16]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_store_that_cannot_be_reached_keeps_nobody_from_starting(tmp_path: Path, expected: list[int]) -> None:
    (tmp_path / "file").write_text("not a folder")
    engine = Engine(make_config(tmp_path / "file" / "store"))
    assert engine.startup_report().lookups[0].reason
    assert generate(engine) == expected[:16]


_REPLICA = """
import sys
from pathlib import Path
from tests.engine.test_warm_start import Engine, make_config
from workers.compile.formats.fx_code import FxFormat

build = FxFormat.build
def build_and_tell(self, *args):
    with open(sys.argv[2], "a") as file:
        file.write("x")
    if sys.argv[3] == "slowly":
        import time
        time.sleep(60)
    return build(self, *args)
FxFormat.build = build_and_tell
report = Engine(make_config(Path(sys.argv[1]))).startup_report()
print([phase.note for phase in report.phases if phase.name == "single flight"][0])
"""


@pytest.mark.timeout(240)
def test_a_builder_that_is_killed_is_followed_by_one_that_builds(tmp_path: Path) -> None:
    def start(builds: Path, how: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", _REPLICA, str(tmp_path / "store"), str(builds), how]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)

    first = start(tmp_path / "first", "slowly")
    second = start(tmp_path / "second", "quickly")
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "first").exists() and not (tmp_path / "second").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        text, _ = second.communicate(timeout=200)
    finally:
        first.kill()
        first.wait()
        second.kill()
        for process in (first, second):
            assert process.stdout is not None
            process.stdout.close()
    assert text.strip() == "built"
    assert (tmp_path / "second").read_text() == "xxx", "each of the three pieces once"


def test_who_built_pieces_does_not_try_them_in_another_process(tmp_path: Path) -> None:
    generate(Engine(make_config(tmp_path, self_check="node")))
    report = Engine(make_config(tmp_path, self_check="node")).startup_report()
    checks = [phase for phase in report.phases if phase.name == "self-check"]
    assert checks[0].note == "passed before on this node"
    assert sum(phase.end_s - phase.start_s for phase in checks if phase.end_s is not None) < 1.0
