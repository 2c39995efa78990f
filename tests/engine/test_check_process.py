"""The process that tries pieces may be begun before there is anything to try; it is used once, or ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_checkpoint
from workers.compile import check_process
from workers.compile.check_process import CheckProcess, begun_early, is_expected
from workers.config import EngineConfig
from workers.engine.start import start_engine


class Counting(CheckProcess):
    """Remembers every process."""

    begun: list[Counting]

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.begun.append(self)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Counting]:
    Counting.begun = []
    monkeypatch.setattr(check_process, "CheckProcess", Counting)
    return Counting.begun


@pytest.fixture(autouse=True)
def _node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMGRAPH_ARTIFACTS", str(tmp_path / "one"))


def make_config(store: Path | None, *, is_compiled: bool = True, **fields: Any) -> EngineConfig:
    mode = "VLLM_COMPILE" if is_compiled else "NONE"
    return EngineConfig.create(
        model=str(tiny_checkpoint("llama")),
        device="cpu",
        dtype="float32",
        max_model_len=64,
        skip_tokenizer_init=True,
        compilation_config={"mode": mode, "piece_format": "fx"},
        artifacts={"store": str(store) if store else None, "trust": "none"},
        **fields,
    )


def test_a_node_that_has_yet_to_try_the_pieces_begins_early(
    tmp_path: Path, processes: list[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "store")
    start_engine(config)
    assert processes == [], "nothing was in the store, and who builds tries in its own process"
    monkeypatch.setenv("WARMGRAPH_ARTIFACTS", str(tmp_path / "two"))
    assert is_expected(config)
    engine = start_engine(config)
    assert engine.runner.artifact_warm
    assert len(processes) == 1, "the one that was begun early is the one that tried"
    assert processes[0].has_ended
    assert not is_expected(config)
    start_engine(config)
    assert len(processes) == 1


def test_a_process_that_is_not_needed_is_ended(tmp_path: Path, processes: list[Counting]) -> None:
    (tmp_path / "store" / "bundles").mkdir(parents=True)
    with begun_early(make_config(tmp_path / "store")):
        (process,) = processes
        assert not process.has_ended
        check_process.not_needed()
        assert process.has_ended
    with pytest.raises(KeyError), begun_early(make_config(tmp_path / "store")):
        raise KeyError
    assert processes[1].has_ended


@pytest.mark.parametrize("fields", [{"enforce_eager": True}, {"is_compiled": False}])
def test_nothing_is_begun_where_nothing_is_compiled(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "store" / "bundles").mkdir(parents=True)
    assert is_expected(make_config(tmp_path / "store"))
    assert not is_expected(make_config(tmp_path / "store", **fields))
    assert not is_expected(make_config(tmp_path / "empty"))
    assert not is_expected(make_config(None))


def test_a_process_that_nobody_talks_to_any_more_ends_by_itself() -> None:
    command = [sys.executable, "-m", "workers.compile.self_check_child", "cpu"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=120).returncode == 0
