"""The official ``openai`` client against the application behind a real HTTP server on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest
import uvicorn

from cluster.messages import GenerateRequest
from tests.api_fakes import Api, Step, answer, finish, make_api
from workers.errors import EngineDeadError, QueueFullError
from workers.outputs import FinishReason

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@contextlib.asynccontextmanager
async def served(api: Api) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    """An ``openai`` client connected to ``api``."""
    config = uvicorn.Config(api.app, host="127.0.0.1", port=0, ws="none", log_level="warning")
    server = uvicorn.Server(config)
    config.load()
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield client
    finally:
        server.should_exit = True
        await task


async def test_chat_plain_and_streamed() -> None:
    async with served(make_api()) as client:
        whole = await client.chat.completions.create(model="fake", messages=MESSAGES, n=2)
        assert [choice.message.content for choice in whole.choices] == ["Hello world"] * 2
        assert whole.choices[0].message.role == "assistant"
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details is not None
        assert (whole.usage.completion_tokens, whole.usage.prompt_tokens_details.cached_tokens) == (4, 3)
        stream = await client.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello world"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage == whole.usage.model_copy(update={"completion_tokens": 2, "total_tokens": 21})


async def test_the_chat_stream_helper_accumulates() -> None:
    async with served(make_api()) as client:
        async with client.chat.completions.stream(
            model="fake", messages=MESSAGES, logprobs=True, top_logprobs=1
        ) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "Hello world"
        assert final.choices[0].logprobs is not None
        assert final.choices[0].logprobs.content is not None
        assert [entry.token for entry in final.choices[0].logprobs.content] == ["Hello", " world"]


async def test_completions_plain_and_streamed() -> None:
    async with served(make_api(answer("a", "b", "\u2028c"))) as client:
        whole = await client.completions.create(model="fake", prompt=["x", "y"], logprobs=1)
        assert [choice.text for choice in whole.choices] == ["ab\u2028c"] * 2
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.tokens == ["a", "b", "\u2028c"]
        stream = await client.completions.create(model="fake", prompt=[[1, 2], [3]], stream=True)
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == ["ab\u2028c"] * 2


async def test_extension_parameters_go_in_extra_body() -> None:
    api = make_api()
    async with served(api) as client:
        await client.chat.completions.create(
            model="fake", messages=MESSAGES, extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True}
        )
    params = api.model.requests[0].params
    assert (params.top_k, params.min_p, params.ignore_eos) == (5, 0.1, True)


async def test_models() -> None:
    async with served(make_api()) as client:
        assert [model.id async for model in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("fake")).owned_by == "warmgraph"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-4")


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_client_s_own_exceptions(stream: bool) -> None:
    api = make_api()
    async with served(api) as client:

        async def create(**fields: Any) -> Any:
            return await client.chat.completions.create(
                **{"model": "fake", "messages": MESSAGES, **fields}, stream=stream
            )

        with pytest.raises(openai.BadRequestError) as bad:
            await create(temperature=-1)
        assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
        with pytest.raises(openai.NotFoundError) as unknown:
            await create(model="gpt-4")
        assert unknown.value.code == "model_not_found"
        api.model.script = lambda request: [QueueFullError("full", retry_after_s=4)]
        with pytest.raises(openai.RateLimitError) as full:
            await create()
        assert full.value.response.headers["retry-after"] == "4"
        api.model.script = lambda request: [EngineDeadError("dead")]
        with pytest.raises(openai.InternalServerError) as dead:
            await create()
        assert (dead.value.status_code, dead.value.code) == (503, "engine_dead")


async def test_an_error_in_mid_stream_is_raised_after_the_text() -> None:
    async with served(make_api(lambda request: ["Hello", EngineDeadError("The engine died.")])) as client:
        stream = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        text = ""

        async def read() -> None:
            nonlocal text
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""

        with pytest.raises(openai.APIError, match=r"The engine died\."):
            await read()
        assert text == "Hello"


async def test_leaving_a_stream_aborts_the_request_promptly() -> None:
    api = make_api(lambda request: ["Hello", asyncio.Event()])
    async with served(api) as client:
        stream = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        await anext(aiter(stream))
        assert len(api.model.open) == 1
        await stream.close()
        async with asyncio.timeout(1):
            while api.model.open:
                await asyncio.sleep(0.001)
        assert len(api.model.aborted) == 1


async def test_thirty_two_streams_at_once_are_each_complete() -> None:
    def script(request: GenerateRequest) -> list[Step]:
        prompt = bytes(request.prompt_token_ids[1:]).decode()
        return [*[f"{prompt}:{i} " for i in range(20)], finish("", FinishReason.LENGTH)]

    async with served(make_api(script)) as client:

        async def one(number: int) -> str:
            stream = await client.completions.create(model="fake", prompt=f"p{number}", stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*map(one, range(32)))
    assert texts == ["".join(f"p{number}:{i} " for i in range(20)) for number in range(32)]
