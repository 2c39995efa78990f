"""``warmgraph graphs show``: captures a config's graphs here, or asks a running server."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli.graphs import app
from tests.api_fakes import replica_status
from tests.tiny_models import tiny_checkpoint
from workers.errors import ConfigError, UserError

COMPILATION = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 6]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    engine = {
        "model": str(tiny_checkpoint("llama")),
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "attention_backend": "sdpa",
        "compilation_config": COMPILATION,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": name, "engine": engine} for name in ("one", "two")]}))
    return path


def show(*args: Any) -> str:
    result = CliRunner().invoke(app, ["show", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_configs_graphs_are_captured_and_printed(config: Path) -> None:
    report = json.loads(show(config, "--model", "one", "--json"))["one"]["captured here"]
    assert [(row["num_tokens"], row["state"]) for row in report["graphs"]] == [(size, "captured") for size in (4, 2, 1)]
    assert report["pending"] == 0
    assert report["memory_bytes"] > 0
    output = show(config, "--model", "two", "--set", "models.1.engine.compilation_config.cudagraph_mode=FULL")
    assert "two, captured here: mode FULL, host backend" in output
    assert output.count("captured ") == 7 + 1  # four graphs for mixed batches, three for decode batches, the heading
    assert "captured: 7 FULL in" in output
    assert "sizes: the config: 1, 2, 4, 6" in output


def test_graphs_that_are_off_say_so(config: Path) -> None:
    output = show(config, "--model", "one", "--set", "models.0.engine.enforce_eager=true")
    assert "enforce_eager turns graphs off" in output
    assert "captured: none" in output
    output = show(config, "--model", "one", "--set", "models.0.engine.compilation_config.cudagraph_mode=null")
    assert "set compilation_config.cudagraph_mode" in output


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ([], UserError, "Give a config"),
        (["--url", "127.0.0.1:1"], UserError, "must begin with http"),
        (["--url", "http://127.0.0.1:1"], UserError, "does not answer"),
    ],
)
def test_mistakes_get_a_sentence(args: list[str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        show(*args)


def test_several_models_must_be_told_apart(config: Path) -> None:
    with pytest.raises(ConfigError, match="--model: one, two"):
        show(config)


class _Server:
    """Answers GET /status with a fixed document."""

    def __init__(self, document: Any) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(document).encode()
                self.send_response(200 if self.path == "/status" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> str:
        self._thread.start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def url() -> Iterator[str]:
    status = replica_status().to_dict()
    status["graphs"] |= {"busy_captures": 2, "busy_capture_seconds": 0.75, "longest_busy_capture_s": 0.5}
    models = {
        "m": {"is_ready": True, "replicas": {"a": status}},
        "down": {"is_ready": False, "replicas": {}},
    }
    with _Server({"models": models}) as url:
        yield url


def test_a_running_server_is_asked(url: str) -> None:
    reports = json.loads(show("--url", url, "--json"))
    assert reports["m"]["a"].keys() == replica_status().to_dict()["graphs"].keys()
    assert reports["down"] == {}
    output = show("--url", url)
    assert "m, a: mode FULL_DECODE_ONLY, host backend" in output
    assert "2 sizes pending" in output
    assert "waited for 2 captures, 0.750 s in all and 0.500 s at most" in output
    assert "down: no replica answers" in output
    assert "m, a" not in show("--url", url, "--model", "down")
    with pytest.raises(UserError, match="no model 'x'; it serves 'm', 'down'"):
        show("--url", url, "--model", "x")


def test_another_server_is_told_apart() -> None:
    with _Server(["something else"]) as url, pytest.raises(UserError, match="did not answer as warmgraph"):
        show("--url", url)
