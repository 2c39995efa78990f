"""A scripted model behind the HTTP layer, for its tests: no engine, no Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from cluster.admission.admission import Admission
from cluster.api.app import create_app
from cluster.api.client import ChunkSink
from cluster.api.metrics import HttpMetrics
from cluster.api.settings import ApiSettings
from cluster.messages import DeploymentState, GenerateRequest, ReplicaStatus
from tests.replica_states import replica_state
from workers.errors import InvalidRequestError, UnknownModelError
from workers.graphs import (
    CapturePlan,
    CUDAGraphMode,
    GraphCounters,
    GraphDispatcher,
    GraphMemoryBudget,
    ModeResolution,
    make_report,
)
from workers.outputs import FinishReason, Logprob, TokenChunk
from workers.startup.account import StartupAccount

BOS = 256

#: What a fake request does: a text is a chunk, a chunk is itself, an error is raised, an event is waited for.
Step = str | TokenChunk | Exception | asyncio.Event
Script = Callable[[GenerateRequest], Sequence[Step]]


class ByteTokenizer:
    """One token per UTF-8 byte, BOS before a text unless refused, and a chat template that shows what it got."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([BOS] if add_special_tokens else []) + list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token_id for token_id in ids if token_id != BOS).decode(errors="replace")

    def convert_id(self, token_id: int) -> str:
        return self.decode([token_id])

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        if messages[0]["role"] == "assistant":
            raise InvalidRequestError("The chat template needs a user message first.", param="messages")
        text = "".join(f"<{message['role']}>{message.get('content', '')}" for message in messages)
        text += "".join(f"[{key}={value}]" for key, value in kwargs.items())
        return text + "<assistant>" * add_generation_prompt


def finish(
    text: str = "", reason: FinishReason = FinishReason.STOP, stop_reason: int | str | None = None
) -> TokenChunk:
    """The last chunk of a request: one token with ``text``."""
    return TokenChunk("", token_ids=[0], text=text, finish_reason=reason, stop_reason=stop_reason)


def answer(*texts: str) -> Script:
    """A request that yields ``texts``, one token each, and stops."""
    return lambda request: [*texts[:-1], finish(texts[-1])]


@dataclasses.dataclass
class FakeClient:
    """A model whose requests play a script.

    Attributes:
        replicas: What GET /status reports of it.
        deployment: And what of its deployment.
        requests: Every request so far.
        open: Ids of the requests that are neither finished nor closed.
        aborted: Ids of those that were closed before their end.
    """

    script: Script = dataclasses.field(default_factory=lambda: answer("Hello", " world"))
    name: str = "fake"
    created: int = 1_700_000_000
    max_model_len: int = 1024
    vocab_size: int = 257
    tokenizer: Any = dataclasses.field(default_factory=ByteTokenizer)
    is_ready: bool = True
    num_cached_tokens: int = 3
    replicas: dict[str, ReplicaStatus] = dataclasses.field(default_factory=dict)
    deployment: DeploymentState | None = None
    requests: list[GenerateRequest] = dataclasses.field(default_factory=list)
    open: set[str] = dataclasses.field(default_factory=set)
    aborted: list[str] = dataclasses.field(default_factory=list)

    async def status(self) -> dict[str, ReplicaStatus]:
        return self.replicas

    async def deployment_state(self) -> DeploymentState | None:
        return self.deployment

    async def generate(self, request: GenerateRequest, on_chunks: ChunkSink) -> None:
        self.requests.append(request)
        self.open.add(request.request_id)
        is_first = True
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                await asyncio.sleep(0)
                chunk = TokenChunk("", token_ids=[0], text=step) if isinstance(step, str) else step
                chunk = dataclasses.replace(chunk, request_id=request.request_id)
                if is_first:
                    chunk.num_cached_tokens, is_first = self.num_cached_tokens, False
                if request.params.logprobs is not None and chunk.logprobs is None:
                    chunk.logprobs = [_logprobs(chunk.text, request.params.logprobs) for _ in chunk.token_ids]
                try:
                    on_chunks([chunk])
                except Exception:
                    self.aborted.append(request.request_id)
                    raise
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            raise
        finally:
            self.open.discard(request.request_id)


def _logprobs(text: str, num: int) -> dict[int, Logprob]:
    return {
        i: Logprob(-0.5 * (i + 1), rank=i + 1, decoded_token=text if i == 0 else f"alt{i}") for i in range(max(num, 1))
    }


def replica_status() -> ReplicaStatus:
    """Of a replica with one running request and nothing captured yet."""
    mode = CUDAGraphMode.FULL_DECODE_ONLY
    dispatcher = GraphDispatcher(mode, [1, 2], 2)
    graphs = make_report(
        ModeResolution(mode, mode, None),
        dispatcher,
        GraphCounters(),
        CapturePlan(dispatcher.capture_order(), 2),
        GraphMemoryBudget(),
        backend_name="host",
        bytes_held=0,
        sizes_from="the config",
    )
    state = replica_state(num_running=1, free_blocks=9, total_blocks=10, outstanding_tokens=5, max_num_seqs=2, step=3)
    return ReplicaStatus(state, graphs, StartupAccount("fake").report())


@dataclasses.dataclass
class FakeDirectory:
    """A fixed list of models."""

    clients: list[FakeClient]

    def lookup(self, name: str) -> FakeClient:
        for client in self.clients:
            if client.name == name:
                return client
        raise UnknownModelError(f"No model {name!r} here; served: {', '.join(c.name for c in self.clients)}.")

    def models(self) -> list[FakeClient]:
        return self.clients


@dataclasses.dataclass
class Api:
    """An application with a fake model, and an HTTP client that calls it in process."""

    model: FakeClient
    app: FastAPI
    registry: CollectorRegistry

    async def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
            return await client.request(method, path, **kwargs)

    async def completion(self, **body: Any) -> httpx.Response:
        return await self.request("POST", "/v1/completions", json={"model": "fake", "prompt": "Hi", **body})

    async def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "Hi"}]
        return await self.request("POST", "/v1/chat/completions", json={"model": "fake", "messages": messages, **body})

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def make_api(
    script: Script | None = None,
    *,
    settings: ApiSettings | None = None,
    admission: Admission | None = None,
    **client_fields: Any,
) -> Api:
    """An application with one fake model called ``fake``."""
    model = FakeClient(script or answer("Hello", " world"), **client_fields)
    registry = CollectorRegistry()
    return Api(
        model, create_app(FakeDirectory([model]), HttpMetrics(registry), settings, admission=admission), registry
    )


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which must have the whole OpenAI shape."""
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(text: str) -> list[Any]:
    """The events of a stream, decoded; ``[DONE]`` stays a string."""
    assert text.endswith("\n\n")
    lines = text[:-2].split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]
