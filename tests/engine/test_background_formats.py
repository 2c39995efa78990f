"""Formats that load faster are built for the next start, by one replica, once it has nothing else to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_checkpoint
from workers.compile.errors import BuildFailedError
from workers.compile.piece_set import PieceSet
from workers.compile.stored import StoredPieces
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.runner import background_formats


class FakeBuild:
    """Finishes at once: every build again, under the name of the other format."""

    num_builds = 0
    error: Exception | None = None

    def __init__(self, pieces: PieceSet, piece_format: str, *, sizes: list[int | None]) -> None:
        FakeBuild.num_builds += 1
        pieces.fetch(sizes)
        for record in pieces.plan.pieces.values():
            record.builds += [dataclasses.replace(build, format=piece_format) for build in record.builds]
        self._pieces = dataclasses.replace(pieces, piece_format=piece_format, is_warm=False)

    def wait(self) -> PieceSet:
        if FakeBuild.error is not None:
            raise FakeBuild.error
        return self._pieces


@pytest.fixture(autouse=True)
def _fake_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_formats, "BackgroundBuild", FakeBuild)
    monkeypatch.setattr(FakeBuild, "num_builds", 0)
    monkeypatch.setattr(FakeBuild, "error", None)


def make_engine(folder: Path, **artifacts: Any) -> Engine:
    return Engine(
        EngineConfig.create(
            model=str(tiny_checkpoint("llama")),
            dtype="float32",
            device="cpu",
            max_model_len=64,
            max_num_seqs=4,
            skip_tokenizer_init=True,
            attention_backend="sdpa",
            artifacts={"store": str(folder), "build_in_background": True, "self_check": "off", **artifacts},
            compilation_config={"mode": "VLLM_COMPILE"},
        )
    )


def has_aoti(engine: Engine) -> bool:
    runner = engine.runner
    return StoredPieces(runner.library, runner.bundle_key, ("aoti",), [None]).find() is not None


def idle(engine: Engine) -> None:
    while engine.use_idle_time():
        pass
    if engine.runner._background is not None:
        engine.runner._background.wait()


def test_an_idle_replica_builds_what_the_next_start_loads(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    assert not has_aoti(engine)
    idle(engine)
    assert has_aoti(engine)
    idle(make_engine(tmp_path, build_in_background=False))
    again = engine.runner._background
    assert again is not None
    again.start()
    again.wait()
    assert FakeBuild.num_builds == 1


def test_a_build_that_fails_leaves_the_replica_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeBuild, "error", BuildFailedError("no compiler here"))
    engine = make_engine(tmp_path)
    idle(engine)
    assert "aoti pieces were not built in the background: no compiler here" in caplog.text
    assert not has_aoti(engine)


def test_nothing_is_built_that_cannot_be_kept(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, publish=False)
    idle(engine)
    assert FakeBuild.num_builds == 0
