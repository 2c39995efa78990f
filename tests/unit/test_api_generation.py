"""Responses and streams of both endpoints against a scripted model: bytes, order, errors, disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.responses import ChatCompletionChunk, ChatCompletionResponse, CompletionResponse
from cluster.api.settings import ApiSettings
from cluster.messages import GenerateRequest
from tests.api_fakes import (
    Api,
    ByteTokenizer,
    Step,
    error_of,
    events_of,
    finish,
    make_api,
)
from workers.errors import EngineDeadError, InvalidRequestError, QueueFullError
from workers.outputs import FinishReason, Logprob, TokenChunk

ENDPOINTS = ("completion", "chat")


async def call(api: Api, endpoint: str, **body: Any) -> Any:
    return await getattr(api, endpoint)(**body)


# --- whole responses -------------------------------------------------------------------------------------------------


async def test_a_whole_chat_completion() -> None:
    body = (await make_api().chat()).json()
    assert body.pop("id").startswith("chatcmpl-")
    assert abs(body.pop("created") - time.time()) < 60
    assert body == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
            }
        ],
        "usage": {
            "prompt_tokens": 19,
            "completion_tokens": 2,
            "total_tokens": 21,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
        "system_fingerprint": None,
        "prompt_token_ids": None,
    }


async def test_a_whole_completion_of_several_prompts_is_in_order_and_counts_prompts_once() -> None:
    def script(request: GenerateRequest) -> list[Step]:
        text = bytes(request.prompt_token_ids[1:]).decode() + "/" + request.request_id.rpartition("-")[2]
        return [text, finish("", FinishReason.LENGTH)]

    body = (await make_api(script).completion(prompt=["a", "bc"], n=2)).json()
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "a/0", "length"),
        (1, "a/1", "length"),
        (2, "bc/2", "length"),
        (3, "bc/3", "length"),
    ]
    assert body["usage"]["prompt_tokens"] == 2 + 3
    assert body["usage"]["completion_tokens"] == 8
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}
    assert body["object"] == "text_completion"


async def test_special_tokens_are_the_template_s_in_a_chat_and_the_tokenizer_s_in_a_completion() -> None:
    api = make_api()
    await api.chat()
    await api.completion()
    await api.completion(add_special_tokens=False)
    await api.completion(prompt=[256, 7])
    assert [r.prompt_token_ids for r in api.model.requests] == [
        list(b"<user>Hi<assistant>"),
        [256, *b"Hi"],
        [*b"Hi"],
        [256, 7],
    ]


async def test_messages_reach_the_template() -> None:
    api = make_api()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    kwargs = {"thinking": True}
    await api.chat(messages=messages, chat_template_kwargs=kwargs, add_generation_prompt=False)
    assert bytes(api.model.requests[0].prompt_token_ids) == b"<system>Be brief.<user>a\nb[thinking=True]"


async def test_the_stop_reason_is_reported() -> None:
    api = make_api(lambda request: ["a", finish("", stop_reason="END")])
    assert (await api.completion()).json()["choices"][0]["stop_reason"] == "END"
    assert events_of((await api.chat(stream=True)).text)[-2]["choices"][0]["stop_reason"] == "END"


async def test_echo_puts_the_prompt_before_the_text() -> None:
    api = make_api()
    assert (await api.completion(echo=True)).json()["choices"][0]["text"] == "HiHello world"
    assert (await api.completion(prompt=[72, 105], echo=True)).json()["choices"][0]["text"] == "HiHello world"
    events = events_of((await api.completion(echo=True, stream=True)).text)
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == "HiHello world"


# --- log-probabilities -----------------------------------------------------------------------------------------------


def position(token_id: int, token: str | None, logprob: float = -0.5) -> dict[int, Logprob]:
    return {token_id: Logprob(logprob, rank=2, decoded_token=token), 99: Logprob(-0.25, rank=1, decoded_token="top")}


def scored(request: GenerateRequest) -> list[Step]:
    first = TokenChunk("", token_ids=[1], text="Hé", logprobs=[position(1, "Hé")])
    if request.params.prompt_logprobs is not None:
        first.prompt_logprobs = [None, position(72, "H", -1.0), position(105, "i", float("-inf"))]
    last = finish("y")
    last.logprobs = [position(0, "y", float("-inf"))]
    return [first, last]


async def test_chat_logprobs() -> None:
    choice = (await make_api(scored).chat(logprobs=True, top_logprobs=1)).json()["choices"][0]
    top = {"token": "top", "logprob": -0.25, "bytes": [116, 111, 112]}
    assert choice["logprobs"] == {
        "content": [
            {"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169], "top_logprobs": [top]},
            {"token": "y", "logprob": -9999.0, "bytes": [121], "top_logprobs": [top]},
        ],
        "refusal": None,
    }


async def test_chat_logprobs_without_alternatives() -> None:
    api = make_api(scored)
    choice = (await api.chat(logprobs=True)).json()["choices"][0]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[], []]
    assert api.model.requests[0].params.logprobs == 0


async def test_a_part_of_a_character_has_no_bytes() -> None:
    chunk = dataclasses.replace(finish(), logprobs=[position(0, "\N{REPLACEMENT CHARACTER}")])
    choice = (await make_api(lambda request: [chunk]).chat(logprobs=True)).json()["choices"][0]
    assert choice["logprobs"]["content"][0]["bytes"] is None


async def test_completion_logprobs() -> None:
    choice = (await make_api(scored).completion(logprobs=1)).json()["choices"][0]
    assert choice["logprobs"] == {
        "text_offset": [0, 2],
        "token_logprobs": [-0.5, -9999.0],
        "tokens": ["Hé", "y"],
        "top_logprobs": [{"Hé": -0.5, "top": -0.25}, {"y": -9999.0, "top": -0.25}],
    }


async def test_echo_with_logprobs_scores_the_prompt() -> None:
    api = make_api(scored)
    choice = (await api.completion(logprobs=1, echo=True, add_special_tokens=False, prompt="XHi")).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == ["X", "H", "i", "Hé", "y"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 5]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -9999.0, -0.5, -9999.0]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["text"] == "XHiHéy"
    assert api.model.requests[0].params.prompt_logprobs == 1


async def test_no_tokens_and_echo_score_a_prompt() -> None:
    api = make_api(scored)
    body = (await api.completion(logprobs=1, echo=True, max_tokens=0, add_special_tokens=False, prompt="XHi")).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"], choice["finish_reason"]) == ("XHi", ["X", "H", "i"], "length")
    assert body["usage"]["completion_tokens"] == 0
    assert api.model.requests[0].params.max_tokens == 1


async def test_streamed_logprobs_add_up_to_the_whole() -> None:
    api = make_api(scored)
    body = {"logprobs": 1, "echo": True, "add_special_tokens": False, "prompt": "XHi"}
    whole = (await api.completion(**body)).json()["choices"][0]["logprobs"]
    chunks = [e["choices"][0]["logprobs"] for e in events_of((await api.completion(**body, stream=True)).text)[:-1]]
    assert {key: [item for chunk in chunks for item in chunk[key]] for key in whole} == whole
    whole = (await api.chat(logprobs=True, top_logprobs=1)).json()["choices"][0]["logprobs"]
    events = events_of((await api.chat(logprobs=True, top_logprobs=1, stream=True)).text)[:-1]
    parts = [e["choices"][0]["logprobs"] for e in events]
    assert [entry for part in parts if part for entry in part["content"]] == whole["content"]


async def test_token_ids_are_returned_if_asked_for() -> None:
    api = make_api()
    body = (await api.chat(return_token_ids=True)).json()
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == (list(b"<user>Hi<assistant>"), [0, 0])
    events = events_of((await api.chat(return_token_ids=True, stream=True)).text)[:-1]
    assert events[0]["choices"][0]["prompt_token_ids"] == list(b"<user>Hi<assistant>")
    assert [e["choices"][0].get("token_ids") for e in events] == [None, [0], [0], None]
    events = events_of((await api.completion(return_token_ids=True, stream=True)).text)[:-1]
    assert [e["choices"][0]["token_ids"] for e in events] == [[0], [0]]
    assert events[0]["choices"][0]["prompt_token_ids"] == [256, *b"Hi"]


# --- streams ---------------------------------------------------------------------------------------------------------


async def test_a_streamed_chat_event_by_event() -> None:
    api = make_api(settings=ApiSettings(system_fingerprint="fp"))
    response = await api.chat(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    events = events_of(response.text)
    assert events.pop() == "[DONE]"
    assert len({event.pop("id") for event in events}) == 1
    assert len({event.pop("created") for event in events}) == 1
    head = {"object": "chat.completion.chunk", "model": "fake", "system_fingerprint": "fp"}
    plain = {"index": 0, "logprobs": None, "finish_reason": None}
    assert events == [
        {**head, "choices": [{**plain, "delta": {"role": "assistant", "content": ""}}]},
        {**head, "choices": [{**plain, "delta": {"content": "Hello"}}]},
        {**head, "choices": [{**plain, "delta": {"content": " world"}}]},
        {**head, "choices": [{**plain, "delta": {}, "finish_reason": "stop", "stop_reason": None}]},
    ]


async def test_a_streamed_completion_event_by_event() -> None:
    events = events_of((await make_api().completion(stream=True)).text)
    assert [event["choices"] for event in events[:-1]] == [
        [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": " world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
    ]
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_the_usage_comes_last_if_asked_for(endpoint: str) -> None:
    response = await call(make_api(), endpoint, stream=True, stream_options={"include_usage": True}, n=2)
    events = events_of(response.text)
    assert events.pop() == "[DONE]"
    usage = events.pop()
    num_prompt_tokens = 19 if endpoint == "chat" else 3
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": 4,
        "total_tokens": num_prompt_tokens + 4,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert all(event["usage"] is None for event in events)
    without = events_of((await call(make_api(), endpoint, stream=True)).text)
    assert all("usage" not in event for event in without[:-1])


async def test_chunks_without_text_are_not_sent() -> None:
    api = make_api(lambda request: ["", "a", "", "", "bc", finish()])
    events = events_of((await api.completion(stream=True)).text)
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["a", "bc", ""]
    events = events_of((await api.chat(stream=True)).text)
    assert [event["choices"][0]["delta"].get("content") for event in events[:-1]] == ["", "a", "bc", None]


texts = st.lists(st.text(max_size=8), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=3), st.booleans())
async def test_any_text_arrives_unchanged_and_as_the_models_have_it(choices: list[list[str]], usage: bool) -> None:
    """Whatever characters, however interleaved: parsed events add up to the texts, and fit the documented models."""

    def script(request: GenerateRequest) -> list[Step]:
        own = choices[int(request.request_id.rpartition("-")[2])]
        return [*own[:-1], finish(own[-1])]

    api = make_api(script)
    body = {"stream": True, "n": len(choices), "stream_options": {"include_usage": usage}}
    response = await api.chat(**body)
    assert response.text.isascii()
    received = [""] * len(choices)
    for event in events_of(response.text)[:-1]:
        chunk = ChatCompletionChunk.model_validate(event, strict=True)
        assert json.loads(chunk.model_dump_json(exclude_unset=True)) == event
        for choice in chunk.choices:
            received[choice.index] += choice.delta.content or ""
    assert received == ["".join(own) for own in choices]
    received = [""] * len(choices)
    for event in events_of((await api.completion(**body)).text)[:-1]:
        completion = CompletionResponse.model_validate(event, strict=True)
        for completion_choice in completion.choices:
            received[completion_choice.index] += completion_choice.text
    assert received == ["".join(own) for own in choices]


@pytest.mark.parametrize("options", [{}, {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "n": 2}])
async def test_whole_chats_fit_the_documented_model(options: dict[str, Any]) -> None:
    body = (await make_api().chat(**options)).json()
    assert ChatCompletionResponse.model_validate(body, strict=True).model_dump(mode="json") == body


async def test_choices_are_generated_in_parallel_and_interleave() -> None:
    turn = [asyncio.Event(), asyncio.Event()]

    def script(request: GenerateRequest) -> list[Step]:
        return ["X0", turn[0], finish("X1")] if request.request_id.endswith("-0") else ["Y0", turn[1], finish("Y1")]

    api = make_api(script)
    async with Exchange.post(api, "/v1/completions", stream=True, n=2) as exchange:
        await exchange.wait_for("X0", "Y0")
        turn[1].set()
        await exchange.wait_for("Y1")
        assert "X1" not in exchange.text
        turn[0].set()
        await exchange.finished()
    assert exchange.text.index("Y1") < exchange.text.index("X1")


# --- errors ----------------------------------------------------------------------------------------------------------

FAILURES: list[tuple[Any, int, dict[str, Any]]] = [
    (
        QueueFullError("All queues are full.", retry_after_s=2.2),
        429,
        {
            "message": "All queues are full.",
            "type": "rate_limit_error",
            "param": None,
            "code": "rate_limit_exceeded",
        },
    ),
    (
        EngineDeadError("The engine died."),
        503,
        {"message": "The engine died.", "type": "server_error", "param": None, "code": "engine_dead"},
    ),
    (
        InvalidRequestError("seed is odd.", param="seed"),
        400,
        {"message": "seed is odd.", "type": "invalid_request_error", "param": "seed", "code": "invalid_value"},
    ),
    (
        TokenChunk("", finish_reason=FinishReason.ERROR, error="The logits are NaN."),
        500,
        {"message": "The logits are NaN.", "type": "server_error", "param": None, "code": "generation_failed"},
    ),
    (
        TokenChunk("", finish_reason=FinishReason.ABORT),
        500,
        {
            "message": "The server aborted the request; try again.",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        },
    ),
]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("step", "status", "error"), FAILURES)
async def test_an_error_before_the_first_token_is_a_status(
    endpoint: str, stream: bool, step: Step, status: int, error: dict[str, Any]
) -> None:
    response = await call(make_api(lambda request: [step]), endpoint, stream=stream)
    assert response.status_code == status
    assert error_of(response) == error
    assert response.headers["content-type"] == "application/json"
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(("step", "status", "error"), FAILURES)
async def test_an_error_later_ends_the_stream_with_an_event(
    endpoint: str, step: Step, status: int, error: dict[str, Any]
) -> None:
    api = make_api(lambda request: ["Hello", step])
    events = events_of((await call(api, endpoint, stream=True)).text)
    assert events[-1] == {"error": error}
    assert "[DONE]" not in events
    assert (await call(api, endpoint)).status_code == status
    metric = api.metric("warmgraph_request_success_total", model_name="fake", finished_reason="error")
    assert metric == (0 if status in (400, 429) else 2)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_failing_choice_aborts_the_others(stream: bool) -> None:
    def script(request: GenerateRequest) -> list[Step]:
        return [EngineDeadError("dead")] if request.request_id.endswith("-1") else [asyncio.Event()]

    api = make_api(script)
    response = await api.completion(n=3, stream=stream)
    assert response.status_code == 503
    assert len(api.model.aborted) == 2
    assert not api.model.open


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stream_that_just_ends_is_an_error(stream: bool) -> None:
    response = await make_api(lambda request: ["Hello"]).chat(stream=stream)
    error = events_of(response.text)[-1]["error"] if stream else error_of(response)
    assert error["code"] == "engine_dead"
    assert response.status_code == (200 if stream else 503)


@pytest.mark.parametrize("when", ["before", "later"])
async def test_an_unexpected_error_is_opaque_and_logged(when: str, caplog: pytest.LogCaptureFixture) -> None:
    secret = ZeroDivisionError("secret")
    api = make_api(lambda request: [secret] if when == "before" else ["Hello", secret])
    with caplog.at_level(logging.ERROR, logger="cluster.api.errors"):
        response = await api.chat(stream=True)
    error = error_of(response) if when == "before" else events_of(response.text)[-1]["error"]
    assert response.status_code == (500 if when == "before" else 200)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "secret" not in response.text
    (record,) = caplog.records
    error_id = error["message"].split()[-1].rstrip(".")
    assert error_id in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is secret
    assert response.headers["x-request-id"]


# --- clients that leave ----------------------------------------------------------------------------------------------


class Exchange:
    """One request at the ASGI level, so that the test can leave at any moment and see chunks as they are sent."""

    def __init__(self, api: Api, path: str, body: dict[str, Any]) -> None:
        self.text = ""
        self.status: int | None = None
        self._leave = asyncio.Event()
        self._sent = asyncio.Condition()
        self._body = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.create_task(api.app(scope, self._receive, self._send))
        self._has_body = True

    @classmethod
    @contextlib.asynccontextmanager
    async def post(cls, api: Api, path: str, **body: Any) -> AsyncGenerator[Exchange, None]:
        prompt: dict[str, Any] = {"prompt": "Hi"} if path == "/v1/completions" else {}
        prompt = prompt or {"messages": [{"role": "user", "content": "Hi"}]}
        exchange = cls(api, path, {"model": "fake", **prompt, **body})
        try:
            yield exchange
        finally:
            exchange.task.cancel()
            await asyncio.gather(exchange.task, return_exceptions=True)

    async def _receive(self) -> dict[str, Any]:
        if self._has_body:
            self._has_body = False
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        async with self._sent:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            else:
                self.text += message["body"].decode()
                if not message.get("more_body", False):
                    self._leave.set()  # as servers do
            self._sent.notify_all()

    async def wait_for(self, *texts: str) -> None:
        async with asyncio.timeout(5), self._sent:
            await self._sent.wait_for(lambda: all(text in self.text for text in texts))

    def leave(self) -> None:
        self._leave.set()

    async def finished(self) -> None:
        async with asyncio.timeout(5):
            await self.task


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("has_started", [False, True])
async def test_a_client_that_leaves_aborts_its_requests(path: str, stream: bool, n: int, has_started: bool) -> None:
    api = make_api(lambda request: [*(["Hello"] * has_started), asyncio.Event(), finish()])
    async with Exchange.post(api, path, stream=stream, n=n) as exchange:
        await until(lambda: len(api.model.open) == n)
        if has_started and stream:
            await exchange.wait_for("Hello")
        exchange.leave()
        await exchange.finished()
        assert not exchange.task.cancelled(), "the server must not see its task cancelled"
    assert len(api.model.aborted) == n
    assert not api.model.open
    assert "[DONE]" not in exchange.text
    assert api.metric("warmgraph_request_success_total", model_name="fake", finished_reason="abort") == n
    assert api.metric("warmgraph_http_requests_total", method="POST", endpoint=path, status="499") == 1
    assert api.metric("warmgraph_http_requests_in_flight") == 0


async def test_a_finished_response_is_not_taken_for_a_client_that_left() -> None:
    api = make_api()
    for stream in (False, True):
        async with Exchange.post(api, "/v1/chat/completions", stream=stream) as exchange:
            await exchange.finished()
    assert api.model.aborted == []
    metric = api.metric("warmgraph_http_requests_total", method="POST", endpoint="/v1/chat/completions", status="200")
    assert metric == 2


async def test_a_client_that_leaves_at_the_last_moment_does_not_cancel_the_server() -> None:
    api = make_api()

    class LastMoment(Exchange):
        async def _send(self, message: Any) -> None:
            if message["type"] == "http.response.body":
                self.leave()
                await asyncio.sleep(0)
            await super()._send(message)

    async with LastMoment.post(api, "/v1/chat/completions") as exchange:
        await exchange.finished()
        assert not exchange.task.cancelled()


async def test_a_client_that_leaves_while_sending_its_body_is_no_error() -> None:
    api = make_api()

    class Impatient(Exchange):
        async def _receive(self) -> dict[str, Any]:
            return {"type": "http.disconnect"}

    async with Impatient.post(api, "/v1/chat/completions") as exchange:
        await exchange.finished()
    assert exchange.status is None


async def test_a_server_that_cancels_the_request_aborts_it_and_sees_the_cancellation() -> None:
    api = make_api(lambda request: ["Hello", asyncio.Event()])
    async with Exchange.post(api, "/v1/completions", stream=True) as exchange:
        await exchange.wait_for("Hello")
        exchange.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange.task
    assert len(api.model.aborted) == 1


async def test_a_connection_that_breaks_while_sending_aborts_the_request() -> None:
    api = make_api(lambda request: ["Hello"] * 1000)

    class Broken(Exchange):
        async def _send(self, message: Any) -> None:
            if "Hello" in self.text:
                raise OSError("broken pipe")
            await super()._send(message)

    async with Broken.post(api, "/v1/completions", stream=True) as exchange:
        await exchange.finished()
    assert len(api.model.aborted) == 1
    assert api.metric("warmgraph_request_success_total", model_name="fake", finished_reason="abort") == 1


async def test_a_client_that_takes_nothing_is_given_up_and_its_request_aborted() -> None:
    script: list[Step] = ["Hello", "world", asyncio.Event()]
    api = make_api(lambda request: script, settings=ApiSettings(stalled_client_s=0.1))

    class Stalled(Exchange):
        async def _send(self, message: Any) -> None:
            if "Hello" in self.text:
                await asyncio.Event().wait()
            await super()._send(message)

    async with Stalled.post(api, "/v1/completions", stream=True) as exchange:
        await exchange.finished()
    assert len(api.model.aborted) == 1
    assert api.metric("warmgraph_http_requests_total", method="POST", endpoint="/v1/completions", status="499") == 1


async def test_a_client_that_is_behind_gets_everything_in_few_events_and_stops_nobody() -> None:
    caught_up = asyncio.Event()
    api = make_api(lambda request: [str(number) + " " for number in range(1000)] + [finish("end")])

    class Behind(Exchange):
        async def _send(self, message: Any) -> None:
            if "1 " in self.text:
                await caught_up.wait()
            await super()._send(message)

    async with Behind.post(api, "/v1/chat/completions", stream=True, n=2) as exchange:
        await until(lambda: api.model.requests and not api.model.open)
        assert exchange.text.count("data: ") < 10
        caught_up.set()
        await exchange.finished()
    events = events_of(exchange.text)
    assert len(events) < 20
    for index in range(2):
        own = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
        text = "".join(choice["delta"].get("content", "") for choice in own)
        assert text == "".join(f"{number} " for number in range(1000)) + "end"
        assert own[-1]["finish_reason"] == "stop"


async def test_a_connection_that_breaks_while_the_client_is_behind_aborts_the_request() -> None:
    breaks = asyncio.Event()
    goes_on = asyncio.Event()
    api = make_api(lambda request: ["Hello", "world", goes_on, "again", asyncio.Event()])

    class Broken(Exchange):
        async def _send(self, message: Any) -> None:
            if "Hello" in self.text:
                await breaks.wait()
                raise OSError("broken pipe")
            await super()._send(message)

    async with Broken.post(api, "/v1/completions", stream=True) as exchange:
        await exchange.wait_for("Hello")
        breaks.set()
        await asyncio.sleep(0.01)
        goes_on.set()
        await exchange.finished()
    assert len(api.model.aborted) == 1


# --- the event loop --------------------------------------------------------------------------------------------------


class ThreadRecorder(ByteTokenizer):
    """Remembers on which threads it worked."""

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]:
        self.threads.add(threading.current_thread().name)
        return super().encode(text, add_special_tokens)


@pytest.mark.parametrize("num_chars", [10, 900])
async def test_long_prompts_are_tokenised_off_the_event_loop(num_chars: int) -> None:
    tokenizer = ThreadRecorder()
    api = make_api(settings=ApiSettings(inline_tokenization_chars=100), tokenizer=tokenizer)
    await api.completion(prompt="x" * num_chars)
    await api.chat(messages=[{"role": "user", "content": "x" * num_chars}])
    await api.completion(prompt=["x" * (num_chars // 2)] * 2)
    is_on_loop = {name == threading.current_thread().name for name in tokenizer.threads}
    assert is_on_loop == {num_chars == 10}


async def test_the_event_loop_goes_on_while_a_long_prompt_is_tokenised() -> None:
    release = threading.Event()

    class Blocked(ByteTokenizer):
        def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]:
            if len(text) > 100:
                assert release.wait(10)
            return super().encode(text, add_special_tokens)

    api = make_api(settings=ApiSettings(inline_tokenization_chars=100), tokenizer=Blocked())
    slow = asyncio.create_task(api.completion(prompt="x" * 500))
    await asyncio.sleep(0)
    assert (await api.completion()).status_code == 200
    assert not slow.done()
    release.set()
    assert (await slow).status_code == 200
