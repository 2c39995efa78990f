"""``warmgraph warm``: afterwards a replica finds every format; mistakes are answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli.main import app
from tests.engine.test_warm_start import make_config
from workers.engine.warm import warm
from workers.errors import ConfigError


def write_config(folder: Path, **engine: Any) -> Path:
    data = make_config(folder / "store").model_dump(mode="json") | engine
    path = folder / "deployment.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "tiny", "engine": data}]}))
    return path


def test_everything_is_there_the_second_time(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    runner = CliRunner()
    first = runner.invoke(app, ["warm", config, "--json"], catch_exceptions=False)
    report = json.loads(first.stdout)["tiny"]
    (row,) = report["formats"]
    assert (row["name"], row["num_pieces"]) == ("fx", 3)
    assert row["num_bytes"] > 0
    assert not row["was_there"]
    assert row["seconds"] > 0
    second = runner.invoke(app, ["warm", config], catch_exceptions=False)
    assert "was there" in second.stdout
    assert report["key"][:12] in second.stdout


def test_without_a_store_there_is_nothing_to_do() -> None:
    with pytest.raises(ConfigError, match=r"artifacts\.store"):
        warm(make_config(None))


def test_without_compilation_there_is_nothing_to_do(tmp_path: Path) -> None:
    config = make_config(tmp_path).model_copy(update={"enforce_eager": True})
    with pytest.raises(ConfigError, match="VLLM_COMPILE"):
        warm(config)
