"""Scaling a served model with its load: 1 -> 3 -> 1 and 0 -> 1, with the times of decisions, starts and drains.

Starts ``warmgraph serve`` on a Ray cluster of its own and streams completions through the API. When the load was
noticed and the target changed is read from the log of Serve's controller, since asking takes part of the time that is
to be measured; how many replicas run is asked through `/status`, twice per second. A tiny random model is served unless
--model names another. Ends in one JSON line.

    python benchmarks/autoscale.py --max-replicas 3
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

MODEL = "scaled"
_LOG_TIME = re.compile(r"[A-Z]+ (\S+ [\d:,]+) ")


def _config(model: str, port: int, args: argparse.Namespace) -> dict[str, Any]:
    scaling = {"min_replicas": 0, "max_replicas": args.max_replicas, "downscale_delay_s": 3}
    return {
        "models": [
            {
                "name": MODEL,
                "engine": {"model": model, "device": "cpu", "max_num_seqs": 4, "num_threads": 1},
                "replicas": {
                    "num_replicas": 1,
                    "num_cpus": 0.1,
                    "max_queued_requests": 10_000,
                    "autoscaling": {**scaling, "downscale_to_zero_delay_s": 3},
                },
            }
        ],
        "http": {"port": port},
    }


def _tiny_model(folder: Path) -> str:
    from tests.model_fixtures import write_tiny_gguf
    from workers.checkpoint.convert import convert_gguf

    (folder / "model").mkdir()
    convert_gguf(write_tiny_gguf(folder / "tiny.gguf"), folder / "model")
    return str(folder / "model")


@contextlib.contextmanager
def _served(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """``warmgraph serve`` on a Ray cluster of its own; yields its base URL and the folder of Serve's logs."""
    with tempfile.TemporaryDirectory(prefix="wg-", ignore_cleanup_errors=True) as name, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        probe.close()
        folder = Path(name)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(_config(args.model or _tiny_model(folder), port, args)))
        environment = {**os.environ, "WARMGRAPH_RAY_TEMP_DIR": name}
        command = [sys.executable, "-m", "cluster.cli.main", "serve", str(path)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "Ctrl-C" in line:
                    break
            yield f"http://127.0.0.1:{port}", folder / "session_latest" / "logs" / "serve"
        finally:
            process.terminate()
            process.wait(60)


class Watch:
    """What the controller wants and has, with the seconds since the last :meth:`restart`."""

    def __init__(self, url: str) -> None:
        self._status = httpx.Client(base_url=url, timeout=60)
        self.restart()

    def restart(self) -> None:
        """Begin to count from here."""
        self._started_s = time.monotonic()

    def replicas(self) -> tuple[int, int]:
        """Replicas that exist, starting ones among them, and those that run."""
        answer = self._status.get("/status")
        if answer.is_error:
            raise RuntimeError(f"GET /status: {answer.status_code} {answer.text}")
        states = answer.json()["models"][MODEL]["deployment"]["replicas"]
        living = {state: num for state, num in states.items() if "STOPPING" not in state}
        return sum(living.values()), living.get("RUNNING", 0)

    async def until(self, *, decided: int | None = None, running: int | None = None) -> float:
        """Seconds until so many replicas were decided on, or ran."""
        async with asyncio.timeout(300):
            while True:
                num_decided, num_running = await asyncio.to_thread(self.replicas)
                if decided in (None, num_decided) and running in (None, num_running):
                    return round(time.monotonic() - self._started_s, 2)
                await asyncio.sleep(0.5)


class ControllerLog:
    """When Serve's controller did what, in seconds since a load began.

    Args:
        folder: Of Serve's logs.
        began_s: When the load began, in seconds since the epoch.
    """

    def __init__(self, folder: Path, began_s: float) -> None:
        self._folder = folder
        self._began_s = began_s

    def first(self, message: str) -> float | None:
        """Seconds until the first line since then that matches, or None."""
        times = [at_s - self._began_s for at_s, line in self._lines() if re.search(message, line)]
        return min((round(seconds, 2) for seconds in times if seconds >= 0), default=None)

    async def wait_for(self, message: str) -> float:
        """The same, once there is one."""
        async with asyncio.timeout(120):
            while (seconds := self.first(message)) is None:
                await asyncio.sleep(0.2)
        return seconds

    def _lines(self) -> Iterator[tuple[float, str]]:
        """Time in seconds since the epoch, and text, of every line that has a time."""
        for path in self._folder.glob("controller_*.log"):
            for line in path.read_text().splitlines():
                if found := _LOG_TIME.match(line):
                    yield datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp(), line


async def _stream(client: httpx.AsyncClient, url: str, max_tokens: int) -> float:
    """One whole stream; returns the seconds to its first token."""
    body = {"model": MODEL, "prompt": "hello", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    started, first, num_events = time.monotonic(), 0.0, 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return first
            if line.startswith("data: "):
                assert "error" not in json.loads(line[6:]), line
                first = first or time.monotonic() - started
                num_events += 1
    raise AssertionError(f"a stream was cut after {num_events} events")


async def _measure(url: str, logs: Path, args: argparse.Namespace) -> dict[str, Any]:
    watch, results = Watch(url), dict[str, Any]()
    num_streams = 0

    async def load(client: httpx.AsyncClient, stop: asyncio.Event) -> None:
        nonlocal num_streams
        while not stop.is_set():
            await _stream(client, url, args.max_tokens)
            num_streams += 1

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        await _stream(client, url, 8)  # it may have gone to zero before
        await watch.until(running=1)
        many, one = asyncio.Event(), asyncio.Event()
        watch.restart()
        log = ControllerLog(logs, time.time())
        crowd = [asyncio.create_task(load(client, many)) for _ in range(args.streams - 1)]
        last = asyncio.create_task(load(client, one))
        results["up_noticed_s"] = await log.wait_for("the load asks for (?!1 )")
        results["up_decided_s"] = await log.wait_for("Upscaling .* from 1 to")
        results["up_running_s"] = await watch.until(running=args.max_replicas)
        results["up_given_up"] = log.first("Downscaling")
        await asyncio.sleep(args.hold_s)
        many.set()
        watch.restart()
        await asyncio.gather(*crowd)
        results["down_running_1_s"] = await watch.until(decided=1, running=1)
        one.set()
        await last
        watch.restart()
        results["down_to_zero_s"] = await watch.until(decided=0, running=0)
        watch.restart()
        log = ControllerLog(logs, time.time())
        results["from_zero_first_token_s"] = round(await _stream(client, url, 8), 2)
    results["from_zero_decided_s"] = log.first("Upscaling .* from 0 to")
    return {**results, "streams_complete": num_streams}


def main() -> None:
    """Parse the arguments, serve, load, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of an imported model; a tiny random one if not given")
    parser.add_argument("--max-replicas", type=int, default=3)
    parser.add_argument("--streams", type=int, default=24, help="concurrent streams of the load")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--hold-s", type=float, default=3.0, help="how long the load stays once all replicas run")
    args = parser.parse_args()
    with _served(args) as (url, logs):
        results = asyncio.run(_measure(url, logs, args))
    print(json.dumps({"benchmark": "autoscale", "max_replicas": args.max_replicas, "streams": args.streams, **results}))


if __name__ == "__main__":
    main()
