"""The whole path, from the official client through Serve to two engines and back."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import openai
import pytest
from typer.testing import CliRunner

from cluster.cli.graphs import app as graphs_command
from cluster.cli.startup import app as startup_command
from tests.cluster.conftest import MODEL, SCALED, TURNS, Deployment
from workers import LLM, SamplingParams

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PROMPTS = [f"hello world {number}" for number in range(32)]


@pytest.fixture(scope="module")
def expected(deployment: Deployment) -> list[str]:
    """What an engine without a cluster says to ``PROMPTS``, greedily."""
    llm = LLM(str(deployment.folder), dtype="float32", device="cpu", max_num_seqs=16)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


async def stream_completion(client: openai.AsyncOpenAI, prompt: str, max_tokens: int = 24) -> tuple[str, str | None]:
    text, reason = "", None
    stream = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    async for chunk in stream:
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


def test_the_greeting_shows_the_address_and_one_curl(deployment: Deployment) -> None:
    assert f"{deployment.url}/v1" in deployment.greeting
    (curl,) = [line for line in deployment.greeting.splitlines() if line.strip().startswith("curl ")]
    body = json.loads(curl.split("-d '")[1].rstrip().rstrip("'"))
    answer = httpx.post(f"{deployment.url}/v1/chat/completions", json={**body, "max_tokens": 4}, timeout=60)
    assert answer.status_code == 200, answer.text


async def test_concurrent_streams_are_complete_correct_and_spread(deployment: Deployment, expected: list[str]) -> None:
    before = deployment.metric("warmgraph_engine_requests_finished_total")
    async with deployment.client() as client:
        results = await asyncio.gather(*(stream_completion(client, prompt) for prompt in PROMPTS))
    assert [text for text, _ in results] == expected
    assert {reason for _, reason in results} == {"length"}
    after = deployment.metric("warmgraph_engine_requests_finished_total")
    assert len(after) == 2
    assert all(after[replica] > before.get(replica, 0) for replica in after), "a replica was left idle"


async def test_plain_completions_of_many_prompts_come_back_in_order(
    deployment: Deployment, expected: list[str]
) -> None:
    async with deployment.client() as client:
        answer = await client.completions.create(
            model=MODEL, prompt=PROMPTS[:6], max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
        )
    assert [choice.text for choice in answer.choices] == expected[:6]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6 * 24


async def test_chat_streamed_and_plain_agree(deployment: Deployment) -> None:
    messages = [{"role": "user", "content": "hello"}]
    async with deployment.client() as client:
        plain = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, seed=5)  # type: ignore[arg-type]
        streamed = ""
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=messages,
            max_tokens=12,
            seed=5,
            stream=True,  # type: ignore[arg-type]
        )
        async for chunk in stream:
            streamed += chunk.choices[0].delta.content or ""
    assert streamed == plain.choices[0].message.content


async def test_n_choices_with_a_seed_differ_and_repeat(deployment: Deployment) -> None:
    async with deployment.client() as client:
        answers = [
            await client.completions.create(model=MODEL, prompt="hello", max_tokens=16, n=4, seed=3, temperature=1.5)
            for _ in range(2)
        ]
    texts = [[choice.text for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_status_and_its_command_show_every_replica(deployment: Deployment) -> None:
    request = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
    httpx.post(f"{deployment.url}/v1/completions", json=request, timeout=60).raise_for_status()
    models = httpx.get(f"{deployment.url}/status", timeout=60).json()["models"]
    replicas = models[MODEL]["replicas"]
    assert len(replicas) == 2
    assert sum(replica["graphs"]["batches"].get("NONE", 0) for replica in replicas.values()) > 0
    # Replicas of the other models come and go with their traffic, so each output is held against itself.
    started = CliRunner().invoke(startup_command, ["show", "--url", deployment.url]).output
    assert started.count("weights") == started.count("ready after") >= 2
    output = CliRunner().invoke(graphs_command, ["show", "--url", deployment.url]).output
    for name in replicas:
        assert started.count(f"{MODEL}, {name}, ") == 1
        assert output.count(f"{MODEL}, {name}: mode NONE, host backend") == 1
    assert "graphs are off" in output


async def test_models_are_listed(deployment: Deployment) -> None:
    async with deployment.client() as client:
        assert [model.id async for model in client.models.list()] == [MODEL, TURNS, SCALED]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "other"}, 404, "'other' is not served here; use 'tiny', 'turns', 'scaled'"),
        ({"prompt": "x" * 300}, 400, "shorten the prompt"),
        ({"temperature": -1}, 400, "temperature"),
        ({"prompt": ""}, 400, "prompt"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"topp": 1}, 400, "top_p"),
        ({"prompt": "x" * 70000}, 413, "65536"),
        ({"stop_token_ids": [99999999999]}, 400, "stop_token_ids"),
    ],
)
def test_errors_are_answers(deployment: Deployment, body: dict[str, object], status: int, words: str) -> None:
    request = {"model": MODEL, "prompt": "hello", "max_tokens": 4, **body}
    answer = httpx.post(f"{deployment.url}/v1/completions", json=request, timeout=60)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


async def test_a_client_that_leaves_frees_its_blocks_within_a_second(deployment: Deployment) -> None:
    blocks = deployment.metric("warmgraph_kv_blocks")
    async with deployment.client() as client:
        stream = await client.completions.create(
            model=MODEL, prompt="hello", max_tokens=200, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        assert sum(deployment.metric("warmgraph_num_requests_running").values()) == 1
        await stream.close()
    left = time.monotonic()
    while deployment.metric("warmgraph_kv_blocks_free") != blocks:
        assert time.monotonic() - left < 1.0, "blocks were still held a second after the client left"
    assert sum(deployment.metric("warmgraph_num_requests_running").values()) == 0


async def test_a_full_queue_answers_429_with_retry_after(deployment: Deployment) -> None:
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        body = {"model": MODEL, "prompt": "hello", "max_tokens": 100, "ignore_eos": True}
        answers = await asyncio.gather(
            *(client.post(f"{deployment.url}/v1/completions", json=body) for _ in range(140))
        )
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
