"""The load test: what it sends is drawn from a seed, what it reports is what happened."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from typer.testing import CliRunner

from cluster.bench.client import Timing
from cluster.bench.report import distribution, summarize
from cluster.bench.workload import Lengths, Workload
from cluster.cli.bench import app
from cluster.messages import GenerateRequest
from tests.api_fakes import Api, Step, finish, make_api
from workers.errors import ConfigError, EngineDeadError, QueueFullError

WORKLOAD = Workload(Lengths(10, 20), Lengths(5, 5), shared_share=0.5, num_prefixes=1, prefix_share=0.5, rate=10.0)


def test_a_workload_is_the_same_every_time_and_another_with_another_seed() -> None:
    first = [*WORKLOAD.requests(50)]
    assert first == [*WORKLOAD.requests(50)]
    assert first[:20] == [*WORKLOAD.requests(20)]
    assert first != [*dataclasses.replace(WORKLOAD, seed=1).requests(50)]


def test_lengths_shares_and_gaps_are_as_asked_for() -> None:
    requests = [*WORKLOAD.requests(1000)]
    words = [request.prompt.split() for request in requests if isinstance(request.prompt, str)]
    assert {len(w) for w in words} == set(range(10, 21))
    assert {request.max_tokens for request in requests} == {5}
    beginnings = [tuple(w[:5]) for w in words]
    most_common = max(beginnings.count(b) for b in set(beginnings))
    assert 400 < most_common < 600
    assert sum(request.gap_s for request in requests) == pytest.approx(100, rel=0.15)


def test_token_ids_stay_in_the_vocabulary() -> None:
    for request in dataclasses.replace(WORKLOAD, vocab_size=200).requests(100):
        assert isinstance(request.prompt, list)
        assert all(100 <= token < 200 for token in request.prompt)


@pytest.mark.parametrize("text", ["", "0", "a", "5:", ":5", "9:3", "1:2:3"])
def test_a_wrong_length_is_refused(text: str) -> None:
    if text == "5:":
        assert Lengths.parse(text, "--x") == Lengths(5, 5)
        return
    with pytest.raises(ConfigError, match="--x takes a length"):
        Lengths.parse(text, "--x")


def test_percentiles_are_of_the_sample() -> None:
    numbers = distribution([n / 1000 for n in range(1, 101)])
    assert numbers == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert distribution([]) is None


def test_failed_requests_count_as_errors_only() -> None:
    good = Timing(0.0, [0.5, 0.75], 1.0, num_tokens=2, num_prompt_tokens=3)
    bad = Timing(0.0, [0.1], 9.0, num_tokens=1, error="cut off")
    summary = summarize([good, bad], 2.0)
    assert (summary["errors"], summary["output_tokens"], summary["output_tokens_per_s"]) == ({"cut off": 1}, 2, 1.0)
    assert summary["ttft_ms"]["max"] == 500
    assert summary["inter_token_ms"]["max"] == 250
    assert summary["e2e_ms"]["max"] == 1000


@pytest.fixture
def server() -> Iterator[tuple[Api, str]]:
    """The API in front of a scripted model that fails in every way there is."""

    def script(request: GenerateRequest) -> list[Step]:
        number = request.prompt_token_ids[0] % 4
        ends: list[Step] = [finish("c"), EngineDeadError("gone"), QueueFullError("full")]
        return ["a", "b", ends[number]] if number < 2 else [finish("c") if number == 3 else ends[2]]

    api = make_api(script)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uv = uvicorn.Server(uvicorn.Config(api.app, ws="none", log_level="critical", access_log=False))
        thread = threading.Thread(target=lambda: asyncio.run(uv.serve(sockets=[listener])))
        thread.start()
        yield api, f"http://127.0.0.1:{listener.getsockname()[1]}"
        uv.should_exit = True
        thread.join()


@pytest.mark.parametrize("load", [["--concurrency", "3"], ["--rate", "200"]])
@pytest.mark.parametrize("form", [["--json"], []])
def test_the_command(server: tuple[Api, str], load: list[str], form: list[str]) -> None:
    api, url = server
    arguments = ["--url", url, "--model", "fake", "--requests", "40", "--prompt-tokens", "4", "--vocab-size", "256"]
    result = CliRunner().invoke(app, ["serving", *arguments, *load, *form])
    assert len(api.model.requests) == 40
    numbers = [request.prompt_token_ids[0] % 4 for request in api.model.requests]
    lines = result.stdout.strip().splitlines()
    summary = json.loads(lines[-1])
    assert len(lines) == 1
    assert summary["errors"] == {"error event: engine_dead": numbers.count(1), "HTTP 429": numbers.count(2)}
    assert summary["output_tokens"] == 3 * numbers.count(0) + numbers.count(3)
    assert summary["cached_tokens"] == 3 * (numbers.count(0) + numbers.count(3))
    assert result.exit_code == 1
    assert bool(result.stderr) == (not form)


def test_a_server_that_is_not_there_is_an_error() -> None:
    arguments = ["--url", "http://127.0.0.1:1", "--model", "m", "--requests", "2", "--json"]
    result = CliRunner().invoke(app, ["serving", *arguments])
    assert json.loads(result.stdout)["errors"] == {"ClientConnectorError": 2}
