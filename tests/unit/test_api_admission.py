"""Keys, limits and deadlines as a client meets them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from cluster.admission.admission import Admission
from cluster.admission.keys import ApiKey, KeyRing
from tests.api_fakes import Api, Script, answer, error_of, events_of, make_api
from workers.errors import QueueFullError

KEYS = KeyRing(
    [
        ApiKey(name="small", key="sk-small-key", requests_per_minute=3, tokens_per_minute=100, weight=2),
        ApiKey(name="large", key="sk-large-key"),
    ]
)
BODY = {"model": "fake", "prompt": "Hi", "max_tokens": 10}


def keyed_api(script: Script | None = None) -> Api:
    return make_api(script, admission=Admission(KEYS))


async def post(api: Api, key: str | None, timeout: str | None = None, **body: Any) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer sk-{key}-key"}
    if timeout is not None:
        headers["X-Request-Timeout"] = timeout
    return await api.request("POST", "/v1/completions", json={**BODY, **body}, headers=headers)


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_without_a_valid_key_nothing_is_served_but_what_operators_need(key: str | None) -> None:
    api = keyed_api()
    headers = {"Authorization": f"Bearer sk-{key}-key"} if key else {}
    for answered in (
        await post(api, key),
        await api.request("POST", "/v1/chat/completions", content=b"not even JSON", headers=headers),
        await api.request("GET", "/v1/models", headers=headers),
        await api.request("GET", "/v1/models/fake", headers=headers),
    ):
        assert answered.status_code == 401
        assert answered.headers["www-authenticate"] == "Bearer"
        assert error_of(answered)["code"] == "invalid_api_key"
    assert api.model.requests == []
    for path in ("/health", "/metrics", "/version"):
        assert (await api.request("GET", path, headers=headers)).status_code == 200


async def test_a_key_is_known_by_its_name_and_weight() -> None:
    api = keyed_api()
    assert (await post(api, "small")).status_code == 200
    assert [(r.key_name, r.weight) for r in api.model.requests] == [("small", 2.0)]


async def test_requests_per_minute() -> None:
    api = keyed_api()
    assert [(await post(api, "small")).status_code for _ in range(4)] == [200, 200, 200, 429]
    refused = await post(api, "small")
    assert refused.headers["retry-after"] == "20"
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert (await post(api, "large")).status_code == 200


async def test_tokens_per_minute_count_what_was_used_in_the_end() -> None:
    api = keyed_api()  # answers with two tokens whatever is asked for
    assert (await post(api, "small", max_tokens=90)).status_code == 200
    assert (await post(api, "small", max_tokens=90)).status_code == 200
    refused = await post(api, "small", max_tokens=95, stream=True)
    assert refused.status_code == 429
    assert "'small' may use 100 tokens per minute" in error_of(refused)["message"]


async def test_a_refused_request_costs_no_tokens() -> None:
    api = keyed_api(lambda request: [QueueFullError("full", 3.0)])
    for _ in range(2):
        answered = await post(api, "small", max_tokens=90)
        assert (answered.status_code, answered.headers["retry-after"]) == (429, "3")


async def test_a_deadline_ends_a_request_that_has_not_begun() -> None:
    api = make_api(lambda request: [asyncio.Event()])
    started = time.monotonic()
    answered = await post(api, None, timeout="0.05")
    assert time.monotonic() - started < 5
    assert answered.status_code == 504
    assert answered.headers["x-should-retry"] == "false"
    error = error_of(answered)
    assert error["code"] == "deadline_exceeded"
    assert "after 0 tokens" in error["message"]
    assert len(api.model.aborted) == 1


async def test_a_deadline_ends_every_choice_of_a_stream_with_an_error_event() -> None:
    api = make_api(lambda request: ["a", "b", asyncio.Event()])
    answered = await post(api, None, timeout="0.2", stream=True, n=2)
    assert answered.status_code == 200
    events = events_of(answered.text)
    assert "".join(e["choices"][0]["text"] for e in events[:-1] if e["choices"]) in ("abab", "aabb")
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    assert len(api.model.aborted) == 2
    assert not api.model.open
    assert api.metric("warmgraph_request_success_total", model_name="fake", finished_reason="abort") == 2


async def test_a_request_within_its_deadline_does_not_notice() -> None:
    api = make_api(answer("Hello", " world"))
    assert (await post(api, None, timeout="30")).json()["choices"][0]["text"] == "Hello world"
    assert (await post(api, None, timeout="soon")).status_code == 400


async def test_the_operator_bounds_deadlines() -> None:
    api = make_api(lambda request: [asyncio.Event()], admission=Admission(None, 60.0, 0.05))
    assert (await post(api, None)).status_code == 504
    assert (await post(api, None, timeout="60")).status_code == 504
