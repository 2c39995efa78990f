"""One real Ray cluster per test session, started as a user starts it: ``warmgraph serve`` in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from tests.cluster.chaos import replica_pids
from tests.model_fixtures import write_tiny_gguf
from workers.checkpoint.convert import convert_gguf

MODEL = "tiny"
#: The same model again: with replicas that take turns, and with as many replicas as the load needs.
TURNS, SCALED = "turns", "scaled"
START_TIMEOUT_S = 180


@dataclasses.dataclass(frozen=True, slots=True)
class Deployment:
    """A running deployment of a tiny model under three names: ``MODEL`` with two replicas, ``TURNS`` and ``SCALED``.

    Attributes:
        url: Base URL of the API.
        folder: The model's checkpoint.
        process: ``warmgraph serve``.
        ray_dir: Ray's folder; names the cluster's address.
        greeting: What it printed when it was ready.
    """

    url: str
    folder: Path
    process: subprocess.Popen[str]
    ray_dir: Path
    greeting: str

    def client(self) -> openai.AsyncOpenAI:
        """The official client, without its own retries."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def engine_pids(self, model: str = MODEL) -> list[int]:
        """Processes of a model's engine replicas."""
        return self.pids(f"engine-{model}")

    def pids(self, part: str) -> list[int]:
        """Serve replicas' processes whose command has ``part`` in it."""
        return replica_pids(self.process.pid, part)

    def metric(self, name: str, model: str = MODEL) -> dict[str, float]:
        """One metric's values for a model by its ``replica`` label."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        values = {}
        for line in text.splitlines():
            if line.startswith(name + "{") and f'model="{model}"' in line:
                labels, value = line.rsplit(" ", 1)
                values[labels.split('replica="')[1].split('"')[0]] = float(value)
        return values

    def wait_for(self, condition: str, timeout_s: float = 60) -> None:
        """Wait until ``/health`` says ``condition`` and both replicas answer a scrape."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            answer = httpx.get(f"{self.url}/health", timeout=60).json()
            if answer["status"] == condition and len(self.metric("warmgraph_engine_steps_total")) == 2:
                return
            time.sleep(0.2)
        raise AssertionError(f"health never became {condition!r}: {answer}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a byte-level tokenizer, imported from a GGUF file."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "model").mkdir()
    convert_gguf(write_tiny_gguf(root / "tiny.gguf"), root / "model")
    return root / "model"


@pytest.fixture(scope="session")
def deployment(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """``warmgraph serve`` on two replicas; stopped with SIGINT, as Ctrl-C does, at the end of the session."""
    port = free_port()
    engine = {
        "model": str(tiny_model),
        "dtype": "float32",
        "device": "cpu",
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "num_threads": 1,
    }
    replicas = {
        "num_replicas": 2,
        "num_cpus": 0.1,
        "max_queued_requests": 24,
        "health_check_period_s": 1,
        "health_check_timeout_s": 3,
        "heartbeat_timeout_s": 4,
    }
    # Both replicas as soon as anybody asks; none before, which would make every start slower.
    on_demand = {"min_replicas": 0, "utilization": 0.001, "downscale_to_zero_delay_s": 30, "downscale_delay_s": 30}
    scaling = {
        "min_replicas": 0,
        "max_replicas": 3,
        "utilization": 0.6,
        "queue_target_s": 0.5,
        "downscale_delay_s": 3,
        "downscale_to_zero_delay_s": 2,
    }
    config = {
        "models": [
            {"name": MODEL, "engine": engine, "replicas": replicas},
            {
                "name": TURNS,
                "engine": engine,
                "replicas": {**replicas, "num_replicas": 0, "autoscaling": {**on_demand, "max_replicas": 2}},
                "routing": {"policy": "round_robin"},
            },
            {
                "name": SCALED,
                "engine": {**engine, "max_num_seqs": 4},
                "replicas": {**replicas, "num_replicas": 0, "max_queued_requests": 100, "autoscaling": scaling},
            },
        ],
        "http": {"port": port, "max_body_bytes": 65536},
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    # Ray's socket paths must be short, so its folder cannot lie in pytest's.
    with tempfile.TemporaryDirectory(prefix="wg-", ignore_cleanup_errors=True) as ray_dir:
        environment = {**os.environ, "WARMGRAPH_RAY_TEMP_DIR": ray_dir}
        environment.pop("RAY_ADDRESS", None)
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli.main", "serve", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            greeting = _read_until_ready(process)
            yield Deployment(f"http://127.0.0.1:{port}", tiny_model, process, Path(ray_dir), greeting)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            finally:
                process.kill()
                assert process.stderr is not None
                process.stderr.close()


def _read_until_ready(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "Ctrl-C" in line:
            return "".join(lines)
    raise AssertionError(f"warmgraph serve ended with {process.wait()}:\n{''.join(lines)}")
