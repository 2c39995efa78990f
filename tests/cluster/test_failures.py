"""Replicas that die or stop under real streams: the clients see what an undisturbed engine gives, and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest

from tests.cluster.conftest import MODEL, Deployment
from workers import LLM, SamplingParams
from workers.outputs import CompletionOutput

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

MAX_TOKENS = 180


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One request."""

    prompt: str
    params: dict[str, Any]

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(**{"max_tokens": MAX_TOKENS, "ignore_eos": True, **self.params})

    def body(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "prompt": self.prompt,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **self.params,
        }


#: Everything that a replay must carry on: greedy, seeded, penalised, with log-probabilities, with stop strings.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.2, "seed": 11},
    {"temperature": 0.9, "seed": 12, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 13, "logprobs": 2},
    {"temperature": 1.5, "seed": 14, "stop": ["12", "1."], "min_tokens": 20},
)


def make_cases(num: int) -> list[Case]:
    return [Case(f"hello world {number}", KINDS[number % len(KINDS)]) for number in range(num)]


@dataclasses.dataclass
class Received:
    """What a client got of one stream."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: str | None = None
    usage: int | None = None


async def receive(deployment: Deployment, case: Case, received: Received) -> None:
    async with deployment.client() as client:
        stream = await client.post("/completions", cast_to=object, body=case.body(), stream=True, stream_cls=_stream())
        async for event in stream:
            if event.get("usage"):
                received.usage = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                assert received.reason is None, "a token came after the end"
                received.text += choice["text"]
                received.token_ids += choice["token_ids"]
                if choice.get("logprobs"):
                    received.logprobs += choice["logprobs"]["token_logprobs"]
                received.reason = choice["finish_reason"]


def _stream() -> Any:
    import openai

    return openai.AsyncStream[Any]


@pytest.fixture(scope="module")
def engine(deployment: Deployment) -> LLM:
    """An engine that nobody disturbs."""
    return LLM(str(deployment.folder), dtype="float32", device="cpu", max_num_seqs=16)


def undisturbed(engine: LLM, cases: Sequence[Case]) -> list[CompletionOutput]:
    params = [case.sampling_params() for case in cases]
    outputs = engine.generate([case.prompt for case in cases], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def assert_is_undisturbed(case: Case, received: Received, expected: CompletionOutput) -> None:
    assert received.token_ids == expected.token_ids, case
    assert received.text == expected.text
    assert received.reason == expected.finish_reason
    assert received.usage == len(expected.token_ids)
    if expected.logprobs is not None:
        assert received.logprobs == pytest.approx(
            [position[token].logprob for token, position in zip(expected.token_ids, expected.logprobs, strict=True)],
            abs=1e-3,
        )


async def until_all_stream(results: Sequence[Received]) -> None:
    """Wait until every stream has begun."""
    async with asyncio.timeout(60):
        while not all(len(received.token_ids) > 2 for received in results):
            await asyncio.sleep(0.01)


def assert_no_block_is_held(deployment: Deployment) -> None:
    deadline = time.monotonic() + 10
    while deployment.metric("warmgraph_kv_blocks_free") != deployment.metric("warmgraph_kv_blocks"):
        assert time.monotonic() < deadline, "blocks are still held"
        time.sleep(0.1)


async def test_a_killed_replicas_streams_go_on_as_if_nothing_had_happened(deployment: Deployment, engine: LLM) -> None:
    deployment.wait_for("ok")
    cases, results = make_cases(20), [Received() for _ in range(20)]
    expected = undisturbed(engine, cases)
    victim = deployment.engine_pids()[0]
    tasks = [asyncio.create_task(receive(deployment, *pair)) for pair in zip(cases, results, strict=True)]
    await until_all_stream(results)
    os.kill(victim, signal.SIGKILL)
    await asyncio.gather(*tasks)
    for case, received, output in zip(cases, results, expected, strict=True):
        assert_is_undisturbed(case, received, output)
    deployment.wait_for("ok", timeout_s=90)
    assert victim not in deployment.engine_pids()
    assert_no_block_is_held(deployment)


async def test_a_stopped_replicas_streams_go_on_elsewhere_and_it_is_replaced(
    deployment: Deployment, engine: LLM
) -> None:
    deployment.wait_for("ok")
    cases, results = make_cases(10), [Received() for _ in range(10)]
    expected = undisturbed(engine, cases)
    victim = deployment.engine_pids()[0]
    tasks = [asyncio.create_task(receive(deployment, *pair)) for pair in zip(cases, results, strict=True)]
    await until_all_stream(results)
    os.kill(victim, signal.SIGSTOP)
    await asyncio.gather(*tasks)
    for case, received, output in zip(cases, results, expected, strict=True):
        assert_is_undisturbed(case, received, output)
    async with asyncio.timeout(90):
        while victim in deployment.engine_pids():
            await asyncio.sleep(0.5)
    deployment.wait_for("ok", timeout_s=90)
    assert_no_block_is_held(deployment)
