"""What is refused, with which status, body and sentence; and what is accepted."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from cluster.api.protocol import ChatCompletionRequest, CompletionRequest
from cluster.api.settings import ApiSettings
from tests.api_fakes import BOS, Api, error_of, make_api

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


async def refused(api: Api, path: str, body: bytes | dict[str, Any], status: int = 400) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await api.request("POST", path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert not api.model.requests, "a refused request must not reach the model"
    return error_of(response)


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "Hi", **fields}


def chat(*contents: Any, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content} for content in contents or ["Hi"]]
    return {"model": "fake", "messages": messages, **fields}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is empty; send a JSON object."),
        (b"[1]", "The body must be a JSON object, got a list."),
        (b'"x"', 'The body must be a JSON object, got "x".'),
        (
            b'{"model": "fake",\n "prompt": }',
            "The body is not valid JSON: Expecting value at line 2, column 12 (character 29).",
        ),
        (b'{"prompt": "\xff"}', "The body is not valid UTF-8 (at byte 12); send UTF-8."),
        (b'{"top_p": NaN}', "The body is not valid JSON: NaN is not a JSON number."),
        (b'{"n": ' + b"9" * 5000 + b"}", None),
        (b"[" * 200_000, "The body is nested too deeply."),
        (
            b'{"model": "fake", "prompt": "\\ud83d"}',
            "The body has a string with half of a surrogate pair (\\ud800 to \\udfff).",
        ),
    ],
)
async def test_a_malformed_body_is_400_with_the_position(body: bytes, message: str | None) -> None:
    error = await refused(make_api(), COMPLETIONS, body)
    assert message is None or error["message"] == message
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_json")


async def test_a_whole_surrogate_pair_is_a_character() -> None:
    api = make_api()
    content = b'{"model": "fake", "prompt": "\\ud83d\\ude00"}'
    await api.request("POST", COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert api.model.requests[0].prompt_token_ids == [BOS, *"😀".encode()]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": "5"}, "max_tokens", 'max_tokens must be an integer, got "5".'),
        ({"max_tokens": True}, "max_tokens", "max_tokens must be an integer, got true."),
        ({"max_tokens": 5.5}, "max_tokens", "max_tokens must be an integer, got 5.5."),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, unless echo is true."),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be at least 1, got -1."),
        ({"temperature": "1"}, "temperature", 'temperature must be a number, got "1".'),
        ({"temperature": True}, "temperature", "temperature must be a number, got true."),
        ({"temperature": -0.1}, "temperature", "temperature must be at least 0.0 and at most 100.0, got -0.1."),
        ({"top_p": 0}, "top_p", "top_p must be greater than 0.0 and at most 1.0, got 0.0."),
        ({"n": 0}, "n", "n must be between 1 and 128, got 0."),
        ({"stream": 1}, "stream", "stream must be true or false, got 1."),
        ({"logprobs": 21}, "logprobs", "logprobs must be between 0 and 20, got 21."),
        ({"logprobs": True}, "logprobs", "logprobs must be an integer, got true."),
        ({"stop": [1]}, "stop", "stop must be a string or a list of strings."),
        ({"stop": [""]}, "stop", "stop must hold non-empty strings only."),
        ({"stop_token_ids": [257]}, "stop_token_ids", None),
        ({"stop_token_ids": ["1"]}, "stop_token_ids[0]", 'stop_token_ids[0] must be an integer, got "1".'),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias must have token ids as keys, got 'x'."),
        ({"logit_bias": {"1": "1"}}, "logit_bias", "logit_bias must map '1' to a number."),
        ({"logit_bias": {"1": 101}}, "logit_bias", None),
        (
            {"logit_bias": {"1": 0, "257": 1}},
            "logit_bias",
            "logit_bias has the token id 257, but the model's ids go from 0 to 256.",
        ),
        ({"logit_bias": [1]}, "logit_bias", None),
        ({"min_tokens": 17}, "min_tokens", "min_tokens (17) must not exceed max_tokens (16)."),
        ({"stream_options": {}}, "stream_options", "stream_options may only be given with stream=true."),
        ({"prompt": ""}, "prompt", "prompt must not be empty."),
        ({"prompt": []}, "prompt", "prompt must not be empty."),
        ({"prompt": ["a", ""]}, "prompt", "prompt[1] must not be empty."),
        ({"prompt": [[1], []]}, "prompt", "prompt[1] must not be empty."),
        ({"prompt": 5}, "prompt", None),
        (
            {"prompt": ["a", 1]},
            "prompt",
            "prompt must hold strings only, token ids only, or lists of token ids only.",
        ),
        ({"prompt": [1, True]}, "prompt", None),
        (
            {"prompt": [1, 257]},
            "prompt",
            "prompt has the token id 257, but the model's ids go from 0 to 256.",
        ),
        ({"prompt": [-1]}, "prompt", None),
        ({"user": 5}, "user", "user must be a string, got 5."),
        ({"model": "x" * 257}, "model", "model: String should have at most 256 characters."),
    ],
)
async def test_a_wrong_value_is_400_with_its_name(fields: dict[str, Any], param: str, message: str | None) -> None:
    error = await refused(make_api(), COMPLETIONS, completion(**fields))
    assert error["param"] == param
    assert message is None or error["message"] == message
    assert error["message"].startswith(param.partition("[")[0])
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (chat(messages=[]), "messages", "messages must not be empty."),
        (chat(messages="Hi"), "messages", 'messages must be a list, got "Hi".'),
        (chat(messages=["Hi"]), "messages[0]", 'messages[0] must be an object, got "Hi".'),
        (chat(messages=[{"role": "user"}]), "messages[0]", "messages[0] must have content."),
        (chat(None), "messages[0]", "messages[0] must have content."),
        (chat(5), "messages[0].content", "messages[0].content must be a string or a list of text parts."),
        (
            chat("a", [{"type": "text", "text": "b"}, {"type": "image_url", "image_url": {"url": "data:"}}]),
            "messages[1].content",
            "messages[1].content[1] is a part of type 'image_url', but this model reads text only.",
        ),
        (
            chat([{"type": "input_audio", "input_audio": {}}]),
            "messages[0].content",
            "messages[0].content[0] is a part of type 'input_audio', but this model reads text only.",
        ),
        (chat([{"type": "text"}]), "messages[0].content", None),
        (chat([]), "messages[0].content", None),
        (
            chat(messages=[{"role": "function", "name": "f", "content": "1"}]),
            "messages[0].role",
            "messages[0].role must be 'system', 'developer', 'user', 'assistant' or 'tool', got \"function\".",
        ),
        (chat(top_logprobs=2), "top_logprobs", "top_logprobs may only be given with logprobs=true."),
        (
            chat(logprobs=True, top_logprobs=21),
            "top_logprobs",
            "top_logprobs must be between 0 and 20, got 21.",
        ),
        (chat(logprobs=2), "logprobs", "logprobs must be true or false, got 2."),
        (chat(max_tokens=0), "max_tokens", "max_tokens must be at least 1, got 0."),
        (chat(max_completion_tokens=0), "max_completion_tokens", None),
        (chat(max_tokens=1, max_completion_tokens=2), "max_completion_tokens", None),
        (chat(chat_template_kwargs={"tools": []}), "chat_template_kwargs", None),
        (chat(metadata={"a": 1}), "metadata.a", "metadata.a must be a string, got 1."),
        (
            chat(messages=[{"role": "assistant", "content": "x"}]),
            "messages",
            "The chat template needs a user message first.",
        ),
    ],
)
async def test_a_wrong_chat_is_400_with_the_path(body: dict[str, Any], param: str, message: str | None) -> None:
    error = await refused(make_api(), CHAT, body)
    assert error["param"] == param
    assert message is None or error["message"] == message
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")


@pytest.mark.parametrize(("path", "missing"), [(COMPLETIONS, "prompt"), (CHAT, "messages"), (CHAT, "model")])
@pytest.mark.parametrize("is_null", [False, True])
async def test_a_missing_parameter_is_named(path: str, missing: str, is_null: bool) -> None:
    body = completion() if path == COMPLETIONS else chat()
    body.pop(missing)
    error = await refused(make_api(), path, {**body, missing: None} if is_null else body)
    assert error == {
        "message": f"{missing} is required.",
        "type": "invalid_request_error",
        "param": missing,
        "code": "missing_required_parameter",
    }


@pytest.mark.parametrize(
    ("path", "body", "param", "hint"),
    [
        (COMPLETIONS, completion(temprature=1), "temprature", "did you mean temperature?"),
        (COMPLETIONS, completion(max_new_tokens=1), "max_new_tokens", "did you mean max_tokens?"),
        (COMPLETIONS, completion(zzz=1), "zzz", "remove it; /docs lists the valid ones."),
        (CHAT, chat(stream=True, stream_options={"include_usages": True}), "stream_options.include_usages", None),
        (
            CHAT,
            chat(messages=[{"role": "user", "contnt": "x"}]),
            "messages[0].contnt",
            "did you mean content?",
        ),
        (COMPLETIONS, completion(messages=[]), "messages", None),
    ],
)
async def test_an_unknown_parameter_is_answered_with_the_nearest(
    path: str, body: dict[str, Any], param: str, hint: str | None
) -> None:
    error = await refused(make_api(), path, body)
    assert (error["param"], error["code"]) == (param, "unknown_parameter")
    assert error["message"].startswith(f"{param} is not a known parameter; ")
    assert hint is None or error["message"].endswith(hint)


#: A value of each unsupported parameter that asks for something.
ASKS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "response_format": {"type": "json_object"},
    "best_of": 2,
    "store": True,
    "service_tier": "priority",
    "spaces_between_special_tokens": False,
    "modalities": ["text", "audio"],
}


@pytest.mark.parametrize("name", sorted(ChatCompletionRequest.unsupported))
async def test_unsupported_chat_parameters_are_refused_by_name(name: str) -> None:
    error = await refused(make_api(), CHAT, chat(**{name: ASKS.get(name, "x")}))
    assert error["message"].startswith(f"{name} is not supported; remove it")
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", sorted(CompletionRequest.unsupported))
async def test_unsupported_completion_parameters_are_refused_by_name(name: str) -> None:
    error = await refused(make_api(), COMPLETIONS, completion(**{name: ASKS.get(name, "x")}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_nothing_is_both_supported_and_unsupported() -> None:
    for request_type in (ChatCompletionRequest, CompletionRequest):
        assert not set(request_type.unsupported) & set(request_type.model_fields)


async def test_values_that_ask_for_nothing_are_accepted() -> None:
    api = make_api()
    neutral = {name: values[0] if values else None for name, values in ChatCompletionRequest.unsupported.items()}
    assert (await api.chat(**neutral)).status_code == 200
    neutral = {name: values[0] if values else None for name, values in CompletionRequest.unsupported.items()}
    assert (await api.completion(**neutral)).status_code == 200


async def test_null_means_not_given_everywhere() -> None:
    api = make_api()
    optional = {name: None for name, field in ChatCompletionRequest.model_fields.items() if not field.is_required()}
    assert (await api.chat(**optional)).status_code == 200
    optional = {name: None for name, field in CompletionRequest.model_fields.items() if not field.is_required()}
    assert (await api.completion(**optional)).status_code == 200
    with_nulls, without = api.model.requests[1], (await api.completion(), api.model.requests[2])[1]
    assert with_nulls.params == without.params


async def test_an_openai_message_goes_back_in_as_it_came_out() -> None:
    api = make_api()
    reply = (await api.chat()).json()["choices"][0]["message"]
    reply |= {"annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    messages = [{"role": "user", "content": "Hi"}, reply, {"role": "user", "content": "Go on"}]
    assert (await api.chat(messages=messages)).status_code == 200
    assert bytes(api.model.requests[-1].prompt_token_ids) == (b"<user>Hi<assistant>Hello world<user>Go on<assistant>")


async def test_every_sampling_parameter_reaches_the_model() -> None:
    api = make_api()
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 7,
        "min_tokens": 2,
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "max_tokens": 9,
    }
    body = {"stop": ["a", "b"], "stop_token_ids": [3], "logit_bias": {"5": -2}, "n": 2, "logprobs": 4, **fields}
    assert (await api.completion(**body)).status_code == 200
    first, second = (request.params for request in api.model.requests)
    assert {name: getattr(first, name) for name in fields} == fields
    assert (first.stop_strings, first.stop_ids, first.logit_bias) == (("a", "b"), frozenset({3}), {5: -2.0})
    assert (first.logprobs, first.prompt_logprobs, first.n) == (4, None, 1)
    assert (second.seed, second.n) == (8, 1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 16),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 1021}, 1021),
        ({"prompt": [1] * 1020}, 4),
        ({"prompt": [1] * 1023}, 1),
    ],
)
async def test_a_completion_s_default_length_shrinks_to_the_context(fields: dict[str, Any], expected: int) -> None:
    api = make_api()
    assert (await api.completion(**fields)).status_code == 200
    assert api.model.requests[0].params.max_tokens == expected


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, 1005), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 6}, 6)]
)
async def test_a_chat_may_fill_the_context(fields: dict[str, Any], expected: int) -> None:
    api = make_api()
    assert (await api.chat(**fields)).status_code == 200
    assert api.model.requests[0].params.max_tokens == expected


@pytest.mark.parametrize(
    ("path", "body", "param", "numbers"),
    [
        (COMPLETIONS, completion(prompt=[1] * 1024), "prompt", ["1024", "1023"]),
        (COMPLETIONS, completion(prompt="x" * 2000), "prompt", ["2001", "1024", "1023"]),
        (COMPLETIONS, completion(prompt=["x", "y" * 1030]), "prompt", ["1031", "1024"]),
        (COMPLETIONS, completion(max_tokens=1022), "max_tokens", ["3 tokens", "1022", "1024", "1021"]),
        (CHAT, chat("x" * 5000), "messages", ["5017", "1024", "1023"]),
        (CHAT, chat(max_tokens=1006), "max_tokens", ["19 tokens", "1006", "1024", "1005"]),
        (CHAT, chat(max_completion_tokens=1006), "max_completion_tokens", ["1006"]),
    ],
)
async def test_what_exceeds_the_context_is_refused_with_the_numbers(
    path: str, body: dict[str, Any], param: str, numbers: list[str]
) -> None:
    error = await refused(make_api(), path, body)
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert all(number in error["message"] for number in numbers), error["message"]


async def test_too_many_choices_are_refused() -> None:
    api = make_api(settings=ApiSettings(max_choices=4))
    error = await refused(api, COMPLETIONS, completion(prompt=["a", "b", "c"], n=2))
    assert error["message"] == "3 prompts times n=2 are 6 completions; ask for at most 4 in one request."
    assert (await refused(api, CHAT, chat(n=5)))["param"] == "n"


async def test_an_unknown_model_is_404_before_anything_else_is_done() -> None:
    error = await refused(make_api(), CHAT, chat(model="gpt-4"), status=404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


async def test_a_large_body_is_413_by_its_header_and_while_reading() -> None:
    api = make_api(settings=ApiSettings(max_body_bytes=100))
    error = await refused(api, COMPLETIONS, completion(prompt="x" * 100), status=413)
    assert error == {
        "message": "The body exceeds 100 bytes; send less in one request.",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_too_large",
    }
    num_sent = 0

    async def chunked() -> AsyncGenerator[bytes, None]:
        nonlocal num_sent
        for _ in range(1000):
            num_sent += 1
            yield b" " * 10

    response = await api.request("POST", CHAT, content=chunked(), headers={"Content-Type": "application/json"})
    assert (response.status_code, response.headers["connection"]) == (413, "close")
    assert num_sent == 11, "reading stops at the limit"
    assert (await api.completion(prompt="x" * 60)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
async def test_a_body_that_is_not_declared_as_json_is_415(headers: dict[str, str]) -> None:
    api = make_api()
    response = await api.request("POST", COMPLETIONS, content=json.dumps(completion()), headers=headers)
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"
    content_type = {"Content-Type": "Application/JSON; charset=utf-8"}
    response = await api.request("POST", COMPLETIONS, content=json.dumps(completion()), headers=content_type)
    assert response.status_code == 200


async def test_a_model_without_a_tokenizer_takes_token_ids_only() -> None:
    api = make_api(tokenizer=None)
    error = await refused(api, COMPLETIONS, completion())
    assert error["message"].startswith("fake is served without a tokenizer; send prompt")
    assert (await refused(api, CHAT, chat()))["param"] == "messages"
    assert (await refused(api, COMPLETIONS, completion(prompt=[1], echo=True)))["param"] == "echo"
    assert (await refused(api, COMPLETIONS, completion(prompt=[1], stop="x")))["param"] == "stop"
    choice = (await api.completion(prompt=[1, 2])).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 2], [0, 0])
    assert api.model.requests[0].params.detokenize is False
