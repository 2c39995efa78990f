"""Engines start whatever is wrong with the store or with what it holds, and the fleet learns from it."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from cluster.cli.artifacts import app
from tests.compile_cases import MIXING_OPS, MixingModel, mixing_inputs
from tests.tiny_models import tiny_checkpoint
from workers import LLM
from workers.artifacts.errors import Refusal, StoreError
from workers.artifacts.gc import GcPolicy, collect
from workers.artifacts.library import Addition, ArtifactLibrary, Outcome
from workers.artifacts.manifest import Kind
from workers.artifacts.stores.directory import DirectoryStore
from workers.compile import CompiledModel, compile_model, self_check
from workers.compile.errors import BuildFailedError
from workers.compile.formats.fx_code import FxFormat
from workers.compile.key import bundle_key
from workers.config import ArtifactConfig, CompilationConfig
from workers.errors import ConfigError
from workers.modes import CompilationMode

CONFIG = CompilationConfig(mode="VLLM_COMPILE", piece_format="fx")
KEY = bundle_key(CONFIG, torch.device("cpu"), {"x_TE": 0}, splitting_ops=MIXING_OPS, graph={"model": "mixing"})


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node of its own for every test: store, key and verdicts."""
    monkeypatch.setenv("WARMGRAPH_ARTIFACTS", str(tmp_path / "artifacts"))


def library(**config: Any) -> ArtifactLibrary:
    return ArtifactLibrary.from_config(ArtifactConfig(**config))


def start(found: ArtifactLibrary) -> CompiledModel:
    """A replica's start, checked against the eager model."""
    compiled = compile_model(
        MixingModel(2), CONFIG, {"x_TE": mixing_inputs()}, splitting_ops=MIXING_OPS, library=found, key=KEY
    )
    x_TE = mixing_inputs(3)
    torch.testing.assert_close(compiled(x_TE), MixingModel(2)(x_TE))
    return compiled


def replace_piece(found: ArtifactLibrary, code: str) -> None:
    """What a builder with a broken compiler would publish in place of the first piece."""
    bundle = found.open(KEY).bundle
    assert bundle is not None
    entry = next(bundle.find(Kind.PIECE))
    data = json.dumps({"code": code, "imports": {}, "ops": {}}).encode()
    assert found.publish(KEY, [Addition(Kind.PIECE, entry.name, data, "fx")], bundle) is not None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node that has started twice: its store, its key, and the verdict on the pieces."""
    folder = tmp_path_factory.mktemp("node")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WARMGRAPH_ARTIFACTS", str(folder))
        cold, warm = start(library()), start(library())
    assert (cold.report.outcome, cold.report.miss, cold.report.is_warm) == (Outcome.ABSENT, "no_bundle", False)
    assert (warm.report.outcome, warm.report.is_warm) == (Outcome.HIT, True)
    assert len(list((folder / "verdicts").iterdir())) == 1
    return folder


def test_a_third_start_is_not_checked_again(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built, tmp_path / "artifacts")
    monkeypatch.setattr(self_check, "_run_child", lambda *args: pytest.fail("the child ran again"))
    found = library()
    warm = start(found)
    assert warm.counters.num_compiled == warm.counters.num_traces == 0
    assert warm.report.saved_seconds == found.counters.seconds_saved > 0


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("def forward(*args):\n    import os\n    os.abort()\n", "ended with status -6"),
        ("def forward(*args):\n    import time\n    time.sleep(600)\n", "did not finish within 1 s"),
        ("def forward(*args):\n    return tuple(arg * float('nan') for arg in args)\n", "instead of|is off by"),
        ("def forward(:", "SyntaxError"),
    ],
    ids=["crashes", "hangs", "wrong", "does not load"],
)
def test_code_that_is_wrong_takes_nobody_with_it(built: Path, tmp_path: Path, code: str, what: str) -> None:
    shutil.copytree(built, tmp_path / "artifacts")
    found = library(self_check_timeout_s=1)
    replace_piece(found, code)
    again = start(found)
    # The bundle that the bad one superseded is still good, and was tried on this node before.
    marks = found.marks.quarantined(KEY.digest)
    assert [mark.reason for mark in marks] == [Refusal.SELF_CHECK]
    assert re.search(what, marks[0].text), marks[0].text
    assert len(marks[0].blobs) == 1
    assert again.report.is_warm


def test_a_check_that_was_killed_proves_nothing(built: Path, tmp_path: Path) -> None:
    """As the kernel does where memory is short: nothing is held against the pieces, and nobody loads them either."""
    shutil.copytree(built, tmp_path / "artifacts")
    found = library()
    replace_piece(found, "def forward(*args):\n    import os\n    os.kill(os.getpid(), 9)\n")
    with pytest.raises(BuildFailedError, match="was killed, as a machine short of memory does"):
        start(found)
    assert found.marks.quarantined() == []
    assert found.recent_failure(KEY) is None


def test_a_check_for_want_of_disk_proves_nothing(built: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(built, tmp_path / "artifacts")
    verdicts = len(list((tmp_path / "artifacts" / "verdicts").iterdir()))
    found = library()
    replace_piece(found, "raise OSError(28, 'No space left on device')\n")
    with pytest.raises(BuildFailedError, match="Loading failed for want of something on this machine: OSError"):
        start(found)
    assert "pieces could not be checked in a process of their own" in caplog.text
    assert found.marks.quarantined() == []
    assert len(list((tmp_path / "artifacts" / "verdicts").iterdir())) == verdicts


def test_a_full_temporary_folder_is_no_reason_to_fail(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(built, tmp_path / "artifacts")
    shutil.rmtree(tmp_path / "artifacts" / "verdicts")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(self_check.tempfile, "TemporaryDirectory", full)
    assert start(library()).report.is_warm
    assert "No space left on device" in caplog.text


def test_what_is_built_to_the_same_wrong_bytes_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is wrong every time costs the fleet one build more, and no crash."""
    build = FxFormat.build

    def broken(self: FxFormat, *args: Any) -> bytes:
        piece = json.loads(build(self, *args))
        return json.dumps(
            piece | {"code": "def forward(*args):\n    return tuple(arg * nan for arg in args)\n"}
        ).encode()

    with monkeypatch.context() as patch:
        patch.setattr(FxFormat, "build", broken)
        found = library()
        compiled = compile_model(
            MixingModel(2), CONFIG, {"x_TE": mixing_inputs()}, splitting_ops=MIXING_OPS, library=found, key=KEY
        )
        assert not compiled.report.is_warm
        with pytest.raises(BuildFailedError, match="to the byte, what is in quarantine"):
            start(library())
        with pytest.raises(BuildFailedError, match="failed recently"):
            start(library())
    # The remembered failure holds even now that the compiler is right, until it is taken back.
    with pytest.raises(BuildFailedError, match="failed recently"):
        start(library())
    found.marks.forget_failures(KEY.digest)
    assert not start(library()).report.is_warm
    assert start(library()).report.is_warm


def test_nothing_is_collected_that_is_being_built_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle gets more builds: what it has must be there when they are published, wherever the lease is."""
    start(library())
    build, plans = FxFormat.build, []

    def build_and_collect(self: FxFormat, *args: Any) -> bytes:
        plans.append(collect(library(), GcPolicy(max_age_s=0.0, max_bytes=0, grace_s=0.0)))
        return build(self, *args)

    monkeypatch.setattr(FxFormat, "build", build_and_collect)
    config = CONFIG.model_copy(update={"compile_sizes": [4]})
    for is_warm in (False, True):
        compiled = compile_model(
            MixingModel(2), config, {"x_TE": mixing_inputs()}, splitting_ops=MIXING_OPS, library=library(), key=KEY
        )
        assert compiled.report.is_warm is is_warm
    assert len(plans) == 3
    assert all(plan.keys == () and plan.kept == {KEY.digest: "pinned or leased"} for plan in plans)
    assert library().store.list("builds/") == []


def test_a_failed_build_is_remembered_and_served_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FxFormat, *args: Any) -> bytes:
        raise RuntimeError("ptxas ran out of registers")

    with monkeypatch.context() as patch:
        patch.setattr(FxFormat, "build", fail)
        llm = make_llm()
    assert llm.engine.runner._graphs.compiled.mode is CompilationMode.NONE
    counters = llm.engine.stats().artifacts
    assert (counters.num_build_failures, counters.num_eager_starts) == (1, 1)
    expected = tokens(make_llm(mode="NONE"))
    assert tokens(llm) == expected
    again = make_llm()
    assert again.engine.runner._graphs.compiled.mode is CompilationMode.NONE
    assert again.engine.stats().artifacts.num_build_failures == 0
    assert tokens(again) == expected


def make_llm(artifacts: dict[str, Any] | None = None, **compilation: Any) -> LLM:
    return LLM(
        str(tiny_checkpoint("llama")),
        dtype="float32",
        device="cpu",
        max_model_len=64,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        compilation_config={"mode": "VLLM_COMPILE", "piece_format": "fx", **compilation},
        artifacts=artifacts or {},
    )


def tokens(llm: LLM) -> list[int]:
    return list(llm.generate([{"prompt_token_ids": [3, 1, 4, 1, 5]}], use_tqdm=False)[0].outputs[0].token_ids)


def test_an_unreachable_store_costs_seconds(caplog: pytest.LogCaptureFixture) -> None:
    options = {"endpoint": "http://127.0.0.1:9", "region": "us-east-1"}
    found = library(store="s3://artifacts/x", store_options=options, timeout_s=1.0, local_tier=False)
    started = time.monotonic()
    assert start(found).report.outcome is Outcome.UNAVAILABLE
    assert time.monotonic() - started < 30
    assert found.counters.store_failures == {"reading": 1, "writing": 1}
    warnings = [record for record in caplog.records if "Not tried again" in record.message]
    assert len(warnings) == 2


@pytest.mark.parametrize("message", ["No space left on device", "Read-only file system"])
def test_a_store_that_takes_nothing_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: DirectoryStore, name: str, data: bytes) -> bool:
        raise StoreError(message)

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStore, "put_if_absent", refuse)
        assert not start(library()).report.is_warm
        assert f"not published: {message}" in caplog.text
    found = library()
    assert start(found).report.outcome is Outcome.ABSENT
    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStore, "put_if_absent", refuse)
        assert start(library(self_check="off")).report.is_warm


def test_a_home_that_cannot_be_written_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMGRAPH_ARTIFACTS", "/proc/warmgraph")
    llm = make_llm()
    assert llm.engine.runner._graphs.compiled.mode is CompilationMode.VLLM_COMPILE
    assert len(tokens(llm)) > 0


def test_a_store_that_vanishes_between_two_reads(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built, tmp_path / "artifacts")
    get = DirectoryStore.get

    def vanish(self: DirectoryStore, name: str, max_bytes: int) -> bytes | None:
        if name.startswith("blobs/"):
            raise StoreError("stale file handle")
        return get(self, name, max_bytes)

    monkeypatch.setattr(DirectoryStore, "get", vanish)
    found = library()
    assert not start(found).report.is_warm
    assert library().marks.quarantined() == []


def test_explain_says_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = {"model": str(tiny_checkpoint("llama")), "device": "cpu", "dtype": "float32", "max_model_len": 64}
    engine["compilation_config"] = {"mode": "VLLM_COMPILE", "piece_format": "fx"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "m", "engine": engine}]}))

    def explain(*options: str, code: int) -> Any:
        result = CliRunner().invoke(app, ["explain", str(path), *options, "--json"], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return json.loads(result.output)

    with pytest.raises(ConfigError, match="compiles nothing, so it looks for no bundle"):
        explain("--set", "models.0.engine.enforce_eager=true", code=1)
    assert explain(code=1)["explanation"]["nearest"] is None
    LLM(**engine, max_num_seqs=4, skip_tokenizer_init=True)
    assert explain(code=0)["outcome"] == "hit"
    report = explain("--set", "models.0.engine.block_size=32", "--set", "models.0.engine.max_num_seqs=8", code=1)
    assert [item["name"] for item in report["explanation"]["graph"]] == ["block_size"]
    assert report["explanation"]["capture"] == [{"name": "max_num_seqs", "wanted": 8, "stored": 4}]
    with caplog.at_level(logging.INFO):
        llm = LLM(**engine, block_size=32, skip_tokenizer_init=True)
    assert "differs in 1: block_size is 32, there 16" in caplog.text
    assert llm.engine.stats().artifacts.misses == {"block_size": 1}
