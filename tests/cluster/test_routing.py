"""Routing, several models and autoscaling with real replicas. Times are printed, not judged: see the benchmarks."""

from __future__ import annotations

import asyncio
import random
import time

import openai
import pytest

from tests.cluster.conftest import MODEL, SCALED, TURNS, Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

NUM_PREFIXES, NUM_EACH = 8, 6


async def first_token_s(client: openai.AsyncOpenAI, model: str, prompt: str) -> float:
    started, first = time.perf_counter(), 0.0
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=8, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        first = first or time.perf_counter() - started
    return first


async def wait_for_replicas(deployment: Deployment, model: str, num_replicas: int) -> None:
    """Ask until there are so many."""
    async with asyncio.timeout(120), deployment.client() as client:
        while len(deployment.metric("warmgraph_engine_steps_total", model)) != num_replicas:
            await first_token_s(client, model, "anybody there?")


async def hit_rate_on_shared_prefixes(deployment: Deployment, model: str) -> tuple[float, float]:
    """The share of prompt tokens found in a cache, and the mean seconds to the first token."""

    def counters() -> tuple[float, float]:
        hits = deployment.metric("warmgraph_prefix_cache_hits_total", model)
        return sum(hits.values()), sum(deployment.metric("warmgraph_prefix_cache_queries_total", model).values())

    hits, queries = counters()
    prompts = [f"{group}: {'shared ' * 18}{tail}" for group in range(NUM_PREFIXES) for tail in range(NUM_EACH)]
    random.Random(0).shuffle(prompts)
    async with deployment.client() as client:
        times = [
            seconds
            for pair in zip(prompts[::2], prompts[1::2], strict=True)
            for seconds in await asyncio.gather(*(first_token_s(client, model, prompt) for prompt in pair))
        ]
    now_hits, now_queries = counters()
    return (now_hits - hits) / (now_queries - queries), sum(times) / len(times)


async def test_prefixes_are_found_where_they_are(deployment: Deployment) -> None:
    """Two models, the same but for their policy: each prefix is computed once instead of once per replica."""
    await wait_for_replicas(deployment, TURNS, 2)
    turns, turns_s = await hit_rate_on_shared_prefixes(deployment, TURNS)
    balanced, balanced_s = await hit_rate_on_shared_prefixes(deployment, MODEL)
    print(f"\nhit rate and TTFT: balanced {balanced:.3f}, {balanced_s * 1e3:.1f} ms; ", end="")
    print(f"round_robin {turns:.3f}, {turns_s * 1e3:.1f} ms")
    # Of 6 requests with a prefix 5 can hit, or 4 if two replicas have to compute it first.
    assert balanced > turns + 0.05


async def test_a_model_is_served_by_its_own_replicas(deployment: Deployment) -> None:
    before = {model: deployment.metric("warmgraph_engine_requests_finished_total", model) for model in (MODEL, TURNS)}
    async with deployment.client() as client:
        answer = await client.completions.create(model=TURNS, prompt="hello", max_tokens=2)
    assert answer.model == TURNS
    after = {model: deployment.metric("warmgraph_engine_requests_finished_total", model) for model in (MODEL, TURNS)}
    assert sum(after[TURNS].values()) == sum(before[TURNS].values()) + 1
    assert after[MODEL] == before[MODEL]
    assert not set(after[MODEL]) & set(after[TURNS])


class Scaled:
    """Streams to the model that scales, and the number of its replicas."""

    def __init__(self, deployment: Deployment, client: openai.AsyncOpenAI) -> None:
        self._deployment = deployment
        self._client = client
        self._started = time.perf_counter()
        self.num_requests = 0

    async def ask(self, max_tokens: int = 100) -> None:
        """A whole stream, which must be complete."""
        stream = await self._client.completions.create(
            model=SCALED,
            prompt="hello",
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        usage = [chunk.usage async for chunk in stream][-1]
        assert usage is not None
        assert usage.completion_tokens == max_tokens, "a stream was cut"
        self.num_requests += 1

    async def keep_asking(self, until: asyncio.Event) -> None:
        while not until.is_set():
            await self.ask()

    async def wait_for(self, num_replicas: int, what: str) -> None:
        async with asyncio.timeout(120):
            while await asyncio.to_thread(self._num_replicas) != num_replicas:
                await asyncio.sleep(0.1)
        print(f"\n{time.perf_counter() - self._started:6.1f} s: {what}", end="", flush=True)

    def _num_replicas(self) -> int:
        return len(self._deployment.metric("warmgraph_engine_steps_total", SCALED))


async def test_a_model_scales_with_its_load_from_zero_and_back(deployment: Deployment) -> None:
    """0 -> 1 -> 3 -> 1 -> 0 with nothing cut: the first request waits for its replica, drained ones finish streams."""
    async with deployment.client() as client:
        await scale_up_and_down(Scaled(deployment, client))


async def scale_up_and_down(scaled: Scaled) -> None:
    await scaled.wait_for(0, "no replica, one request")
    await scaled.ask()
    await scaled.wait_for(1, "1 replica, answered; now 24 streams at a time")
    many, one = asyncio.Event(), asyncio.Event()
    crowd = [asyncio.create_task(scaled.keep_asking(many)) for _ in range(23)]
    last = asyncio.create_task(scaled.keep_asking(one))
    await scaled.wait_for(3, "3 replicas; now 1 stream at a time")
    many.set()
    await asyncio.gather(*crowd)
    await scaled.wait_for(1, "1 replica; now none")
    one.set()
    await last
    await scaled.wait_for(0, f"no replica; {scaled.num_requests} streams, all complete\n")
