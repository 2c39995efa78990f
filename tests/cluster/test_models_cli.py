"""``warmgraph model``: what it prints and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.model import app
from cluster.models.registry import KNOWN_MODELS
from tests.model_fixtures import write_tiny_gguf
from workers.checkpoint.cache import model_folder
from workers.errors import ModelError


@pytest.fixture(autouse=True)
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WARMGRAPH_CACHE", str(tmp_path / "cache"))
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def _run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.stdout


def test_import_prints_name_and_folder(gguf_file: Path) -> None:
    assert _run("import", str(gguf_file)) == f"tiny is imported: {model_folder('tiny')}\n"
    assert _run("import", str(gguf_file)) == f"tiny is already imported: {model_folder('tiny')}\n"
    assert _run("import", str(gguf_file), "--force", "--name", "tiny") == f"tiny is imported: {model_folder('tiny')}\n"


def test_import_as_json(gguf_file: Path) -> None:
    result = json.loads(_run("import", str(gguf_file), "--name", "mine", "--json"))
    assert result.pop("num_bytes") > 0
    assert result == {"name": "mine", "folder": str(model_folder("mine")), "was_there": False}


def test_progress_is_drawn_on_standard_error(gguf_file: Path) -> None:
    result = CliRunner().invoke(app, ["import", str(gguf_file)])
    assert "Converting" in result.stderr
    assert "Converting" not in result.stdout


def test_ls(gguf_file: Path) -> None:
    assert json.loads(_run("ls", "--json")) == {"imported": [], "known": sorted(KNOWN_MODELS)}
    _run("import", str(gguf_file))
    (row,) = json.loads(_run("ls", "--json"))["imported"]
    assert (row["name"], row["source"], row["folder"]) == ("tiny", "tiny.gguf", str(model_folder("tiny")))
    printed = _run("ls")
    assert "tiny.gguf" in printed
    assert "warmgraph model import smollm2-135m-instruct" in printed


def test_verify(gguf_file: Path) -> None:
    assert _run("verify") == "No model has been imported.\n"
    _run("import", str(gguf_file))
    assert _run("verify") == "tiny: ok\n"
    (model_folder("tiny") / "config.json").unlink()
    assert _run("verify", "tiny", exit_code=1) == "tiny: config.json is missing.\n"
    assert json.loads(_run("verify", "tiny", "--json", exit_code=1)) == {
        "tiny": {"ok": False, "damage": ["config.json is missing."]}
    }


def test_user_errors_are_left_to_the_entry_point() -> None:
    with pytest.raises(ModelError, match="neither a file nor a known model"):
        _run("import", "nothing")
