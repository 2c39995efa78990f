"""Many streams at once, checked token by token, while somebody kills replicas. For a test and a benchmark."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import psutil

from workers import LLM, SamplingParams
from workers.outputs import CompletionOutput

MAX_TOKENS = 180

#: Everything that a replay must carry on: greedy, seeded, penalised, with log-probabilities, with stop strings.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.2, "seed": 11},
    {"temperature": 0.9, "seed": 12, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 13, "logprobs": 2},
    {"temperature": 1.5, "seed": 14, "stop": ["12", "1."], "min_tokens": 20},
)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One request and what an engine that nobody disturbs answers."""

    prompt: str
    params: dict[str, Any]
    expected: CompletionOutput

    def body(self, model: str) -> dict[str, Any]:
        """The request of the API."""
        stream = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        return {"model": model, "prompt": self.prompt, **_LENGTH, **stream, **self.params}


_LENGTH: dict[str, Any] = {"max_tokens": MAX_TOKENS, "ignore_eos": True}


def make_cases(engine: LLM, num: int) -> list[Case]:
    """Cases of every kind."""
    requests = [(f"hello world {number}", KINDS[number % len(KINDS)]) for number in range(num)]
    params = [SamplingParams(**{**_LENGTH, **kind}) for _, kind in requests]
    outputs = engine.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    return [Case(*request, output.outputs[0]) for request, output in zip(requests, outputs, strict=True)]


@dataclasses.dataclass(slots=True)
class Received:
    """What a client got of one stream."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: str | None = None
    usage: int | None = None
    is_done: bool = False
    error: str | None = None
    longest_pause_s: float = 0.0

    def verdict(self, expected: CompletionOutput) -> str:
        """``ok``, ``failed``, ``truncated``, or ``different``: tokens are missing, twice, or others."""
        if self.error is not None:
            return "failed"
        if self.reason is None or not self.is_done:
            return "truncated"
        same = (self.token_ids, self.text, self.reason, self.usage) == (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
            len(expected.token_ids),
        )
        return "ok" if same and self._has_logprobs_of(expected) else "different"

    def _has_logprobs_of(self, expected: CompletionOutput) -> bool:
        if expected.logprobs is None:
            return not self.logprobs
        chosen = [at[token].logprob for token, at in zip(expected.token_ids, expected.logprobs, strict=True)]
        return len(chosen) == len(self.logprobs) and all(
            abs(a - b) < 1e-3 for a, b in zip(chosen, self.logprobs, strict=True)
        )


async def receive(session: aiohttp.ClientSession, url: str, model: str, case: Case, received: Received) -> None:
    """Read one stream to its end, whatever that is."""
    try:
        async with session.post(f"{url}/v1/completions", json=case.body(model)) as response:
            if response.status != 200:
                received.error = f"{response.status}: {await response.text()}"
                return
            last_s = time.monotonic()
            async for line in response.content:
                if line.startswith(b"data: "):
                    received.longest_pause_s = max(received.longest_pause_s, time.monotonic() - last_s)
                    last_s = time.monotonic()
                    _note(line[6:].strip(), received)
    except (aiohttp.ClientError, TimeoutError) as error:
        received.error = repr(error)


def _note(data: bytes, received: Received) -> None:
    if data == b"[DONE]":
        received.is_done = True
        return
    event = json.loads(data)
    if "error" in event:
        received.error = event["error"]["message"]
        return
    if event.get("usage"):
        received.usage = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        received.text += choice["text"]
        received.token_ids += choice["token_ids"]
        received.logprobs += (choice.get("logprobs") or {}).get("token_logprobs", ())
        received.reason = choice["finish_reason"] or received.reason


async def stream_during(
    url: str, model: str, cases: Sequence[Case], concurrency: int, disturb: Callable[[], Any]
) -> tuple[list[tuple[Case, Received]], Any]:
    """Keep ``concurrency`` streams open while ``disturb()`` runs, then let them end.

    Returns:
        Every stream, and what ``disturb()`` returned.
    """
    results: list[tuple[Case, Received]] = []
    numbers = itertools.count()
    is_over = asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def work() -> None:
            while not is_over.is_set():
                case, received = cases[next(numbers) % len(cases)], Received()
                results.append((case, received))
                await receive(session, url, model, case, received)

        workers = [asyncio.create_task(work()) for _ in range(concurrency)]
        try:
            outcome = await disturb()
        finally:
            is_over.set()
        await asyncio.gather(*workers)
    return results, outcome


async def kill_replicas(root_pid: int, num_kills: int, interval_s: float, seed: int = 0, part: str = ":engine-") -> int:
    """SIGKILL a random engine process every ``interval_s``, but never the only one; returns how many."""
    rng, num_killed = random.Random(seed), 0
    while num_killed < num_kills:
        await asyncio.sleep(interval_s)
        pids = replica_pids(root_pid, part)
        if len(pids) > 1:
            os.kill(rng.choice(pids), signal.SIGKILL)
            num_killed += 1
    await asyncio.sleep(1.0)
    return num_killed


def replica_pids(root_pid: int, part: str) -> list[int]:
    """Processes of Serve replicas below ``root_pid`` whose command has ``part`` in it."""
    return [
        process.pid
        for process in psutil.Process(root_pid).children(recursive=True)
        if "ServeReplica" in (command := _command(process)) and part in command
    ]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
