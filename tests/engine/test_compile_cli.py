"""``warmgraph compile show`` prints a model's pieces and writes its graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli.compile import app
from tests.tiny_models import tiny_checkpoint
from workers.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    engine = {"model": str(tiny_checkpoint("qwen3")), "device": "cpu", "dtype": "float32", "max_model_len": 64}
    models = [{"name": "tiny", "engine": engine}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "test", "models": models}))
    return path


def show(*args: Any) -> str:
    result = CliRunner().invoke(app, ["show", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_pieces_are_printed(config: Path) -> None:
    output = show(config)
    assert "4 pieces, 3 of them unique" in output
    assert "between pieces: warmgraph::attention, 3 calls" in output
    assert "passes: qk_rope: 0 matches" in output


def test_a_gpus_graph_is_shown_on_any_machine(config: Path, tmp_path: Path) -> None:
    report = json.loads(show(config, "--device", "meta", "--json", "--graph", tmp_path / "graph"))
    assert [piece["num_calls"] for piece in report["pieces"]] == [1, 2, 1]
    assert (report["passes"]["rope_kv_write"], report["split_ops"]) == (3, {"warmgraph::rope_attention": 3})
    assert {path.name for path in (tmp_path / "graph").iterdir()} == {
        "graph.txt",
        "stitched.py",
        "split.svg",
        *(f"piece-{piece['key'][:8]}.txt" for piece in report["pieces"]),
    }
    assert "rope_attention" in (tmp_path / "graph" / "graph.txt").read_text()


def test_builds_are_shown_once_there_are_some(config: Path, tmp_path: Path) -> None:
    from workers.llm import LLM

    document = yaml.safe_load(config.read_text())
    engine = document["models"][0]["engine"]
    engine["compilation_config"] = {
        "mode": "VLLM_COMPILE",
        "piece_format": "fx",
    }
    engine["artifacts"] = {"store": str(tmp_path / "store")}
    config.write_text(yaml.safe_dump(document))
    LLM(**engine, skip_tokenizer_init=True)
    pieces = json.loads(show(config, "--json"))["pieces"]
    assert [build["format"] for piece in pieces for build in piece["builds"]] == ["fx"] * 3


def test_one_of_several_models_must_be_named(config: Path) -> None:
    document = yaml.safe_load(config.read_text())
    document["models"].append(document["models"][0] | {"name": "other"})
    config.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match="--model: tiny, other"):
        CliRunner().invoke(app, ["show", str(config)], catch_exceptions=False)
