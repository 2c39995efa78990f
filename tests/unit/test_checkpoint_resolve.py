"""What a user may write as ``model``, and what is said if it does not exist. No network is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects

from workers.checkpoint.cache import cache_root, imported_models, model_folder
from workers.checkpoint.resolve import resolve_model
from workers.errors import ModelError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that must not be asked."""
    monkeypatch.setenv("WARMGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return tmp_path / "cache"


def _checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "cache"
    monkeypatch.setenv("WARMGRAPH_CACHE", "relative")
    assert cache_root() == tmp_path / "relative"
    monkeypatch.delenv("WARMGRAPH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "warmgraph"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "warmgraph"


def test_a_folder(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "some" / "model")
    assert resolve_model(str(folder)) == folder
    assert resolve_model("some/model") == folder


def test_an_imported_model(cache: Path, tmp_path: Path) -> None:
    folder = _checkpoint(cache / "models" / "tiny")
    assert resolve_model("tiny") == folder
    assert imported_models() == ["tiny"]
    local = _checkpoint(tmp_path / "tiny")
    assert resolve_model("tiny") == local, "a folder that is right here comes first"


def test_imports_in_progress_are_no_models(cache: Path) -> None:
    _checkpoint(cache / "models" / ".tiny.importing")
    (cache / "models" / "empty").mkdir()
    assert imported_models() == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "-x", "a b", "a\nb"])
def test_names_that_are_no_folder_names(name: str) -> None:
    with pytest.raises(ModelError, match="cannot name a model"):
        model_folder(name)


def test_unknown_name_lists_what_there_is(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"no model 'nope'.*none yet.*warmgraph model import"):
        resolve_model("nope")
    _checkpoint(cache / "models" / "tiny")
    with pytest.raises(ModelError, match=r"imported model \(tiny\)"):
        resolve_model("")


def test_files_are_to_be_imported_first(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.touch()
    with pytest.raises(ModelError, match=r"warmgraph model import .*m\.gguf"):
        resolve_model(str(path))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_repo_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(_checkpoint(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("org/name-1.5") == tmp_path / "snapshot"
    assert asked["repo_id"] == "org/name-1.5"
    files = ["config.json", "model-00001-of-2.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    others = ["pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "README.md", "m.gguf"]
    kept = filter_repo_objects(
        files + others, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == files


_RESPONSE: Any = httpx.Response(404, request=httpx.Request("GET", "http://127.0.0.1"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("no", response=_RESPONSE), "no folder or Hugging Face repo 'org/name'.*HF_TOKEN"),
        (GatedRepoError("gated", response=_RESPONSE), "is gated: accept its terms"),
        (LocalEntryNotFoundError("Offline.\nMore."), r"could not be downloaded.*\(Offline\); check the network"),
        (ConnectionError(), r"\(ConnectionError\)"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        resolve_model("org/name")


def test_a_repo_in_another_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model("org/name")
