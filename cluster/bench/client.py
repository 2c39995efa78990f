"""One streamed request to a server with the OpenAI API, timed.

Trusts nothing: a stream without a finish reason or without its last event is an error, whatever the status was.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any, Literal

import aiohttp

from cluster.bench.workload import PlannedRequest


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What is measured.

    Attributes:
        url: Base URL of the API, without ``/v1``.
        model: The ``model`` of the requests.
        endpoint: Which of the two.
        extra: Fields added to every request's body.
        headers: Sent with every request.
    """

    url: str
    model: str
    endpoint: Literal["completions", "chat"]
    extra: dict[str, Any]
    headers: dict[str, str]


@dataclasses.dataclass(slots=True)
class Timing:
    """What became of one request; times are ``time.perf_counter()`` seconds.

    Attributes:
        started_s: When it was sent.
        token_s: When each event with text came.
        finished_s: When the stream ended.
        num_tokens: Generated tokens, as the server counts them; events, if it does not.
        num_prompt_tokens: Prompt tokens, as the server counts them.
        num_cached_tokens: Of those, how many it had in its prefix cache.
        error: What went wrong, in a few words, or None.
    """

    started_s: float
    token_s: list[float] = dataclasses.field(default_factory=list)
    finished_s: float = 0.0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None


async def send(session: aiohttp.ClientSession, target: Target, request: PlannedRequest) -> Timing:
    """Send one request and read its stream to the end; errors are part of the result."""
    timing = Timing(time.perf_counter())
    path = "/v1/completions" if target.endpoint == "completions" else "/v1/chat/completions"
    try:
        async with session.post(target.url + path, json=_body(target, request), headers=target.headers) as response:
            if response.status != 200:
                timing.error = f"HTTP {response.status}"
                await response.read()
            else:
                await _read(response, timing)
    except TimeoutError:
        timing.error = "timed out"
    except aiohttp.ClientPayloadError:
        timing.error = "connection lost"
    except aiohttp.ClientError as error:
        timing.error = type(error).__name__
    timing.finished_s = time.perf_counter()
    return timing


def _body(target: Target, request: PlannedRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"model": target.model, "max_tokens": request.max_tokens, "stream": True}
    if target.endpoint == "completions":
        body["prompt"] = request.prompt
    else:
        body["messages"] = [{"role": "user", "content": request.prompt}]
    return {**body, "stream_options": {"include_usage": True}, **target.extra}


async def _read(response: aiohttp.ClientResponse, timing: Timing) -> None:
    reason, is_done = None, False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            is_done = True
            break
        event = json.loads(data)
        if "error" in event:
            timing.error = f"error event: {event['error'].get('code')}"
            return
        if event.get("usage"):
            _note_usage(event["usage"], timing)
        for choice in event["choices"]:
            if choice.get("text") or choice.get("delta", {}).get("content"):
                timing.token_s.append(time.perf_counter())
            reason = choice.get("finish_reason") or reason
    if reason is None or not is_done:
        timing.error = "cut off"
    timing.num_tokens = timing.num_tokens or len(timing.token_s)


def _note_usage(usage: dict[str, Any], timing: Timing) -> None:
    timing.num_tokens = usage["completion_tokens"]
    timing.num_prompt_tokens = usage["prompt_tokens"]
    timing.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
