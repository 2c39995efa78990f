"""POST /v1/chat/completions: from the body to the response, streamed or whole."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from cluster.api.body import read_json_body
from cluster.api.client import ModelClient
from cluster.api.context import ApiContext, Arrival, start_generation
from cluster.api.logprobs import chat_logprobs
from cluster.api.prompts import TokenizedPrompt
from cluster.api.protocol import ChatCompletionRequest
from cluster.api.responses import AssistantMessage, ChatChoice, ChatCompletionResponse, ChatLogprobs
from cluster.api.sampling import check_top_logprobs, resolve_max_tokens, sampling_params
from cluster.api.sse import ChunkEnvelope, EventStreamResponse, fill
from cluster.api.validation import parse_request
from workers.outputs import TokenChunk
from workers.sampling_params import SamplingParams

_HOLE = "\0"


async def create_chat_completion(context: ApiContext, http_request: Request) -> Response:
    """Answer one request.

    Raises:
        WarmgraphError: Anything that is answered with an error status.
    """
    arrival = Arrival.now("chatcmpl")
    caller = context.admit(http_request)
    body = await read_json_body(http_request, context.settings.max_body_bytes)
    request = parse_request(ChatCompletionRequest, body)
    client = context.directory.lookup(request.model)
    check_top_logprobs(request.top_logprobs, "top_logprobs")
    context.check_num_choices(1, request.n)
    prompt = await context.prompts.read_chat(request, client)
    generation = start_generation(context, client, arrival, caller, [prompt], [_params(request, client, prompt)])
    if request.stream:
        head = {
            "id": arrival.id,
            "object": "chat.completion.chunk",
            "created": arrival.created,
            "model": client.name,
            "system_fingerprint": context.settings.system_fingerprint,
        }
        envelope = ChunkEnvelope(head, include_usage=request.include_usage)
        return EventStreamResponse(generation, _ChatEncoder(envelope, request, prompt))
    chunks = await generation.collect()
    response = ChatCompletionResponse(
        id=arrival.id,
        created=arrival.created,
        model=client.name,
        choices=[_choice(request, index, chunk) for index, chunk in enumerate(chunks)],
        usage=generation.usage(),
        system_fingerprint=context.settings.system_fingerprint,
        prompt_token_ids=prompt.token_ids if request.return_token_ids else None,
    )
    return Response(response.model_dump_json(), media_type="application/json")


def _params(request: ChatCompletionRequest, client: ModelClient, prompt: TokenizedPrompt) -> SamplingParams:
    is_old_name = request.max_completion_tokens is None and request.max_tokens is not None
    max_tokens = resolve_max_tokens(
        len(prompt.token_ids),
        client.max_model_len,
        request.max_tokens if is_old_name else request.max_completion_tokens,
        param="max_tokens" if is_old_name else "max_completion_tokens",
        prompt_param="messages",
    )
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return sampling_params(request, client, max_tokens, logprobs=logprobs)


def _choice(request: ChatCompletionRequest, index: int, chunk: TokenChunk) -> ChatChoice:
    """A whole completion as a choice."""
    assert chunk.finish_reason is not None
    return ChatChoice(
        index=index,
        message=AssistantMessage(content=chunk.text),
        logprobs=_logprobs(request, chunk),
        finish_reason=chunk.finish_reason.value,  # type: ignore[arg-type]  # errors were raised before
        stop_reason=chunk.stop_reason,
        token_ids=chunk.token_ids if request.return_token_ids else None,
    )


def _logprobs(request: ChatCompletionRequest, chunk: TokenChunk) -> ChatLogprobs | None:
    if not request.logprobs:
        return None
    return chat_logprobs(chunk.token_ids, chunk.logprobs or [], request.top_logprobs or 0)


class _ChatEncoder:
    """Writes the stream's events: for each choice the role, then text, then an empty delta with the reason."""

    def __init__(self, envelope: ChunkEnvelope, request: ChatCompletionRequest, prompt: TokenizedPrompt) -> None:
        self.envelope = envelope
        self._request = request
        self._prompt = prompt
        self._is_plain = not request.logprobs and not request.return_token_ids
        self._is_started = [False] * request.n
        self._frames = [
            envelope.text_frame(_chunk_choice(index, {"content": _HOLE}), _HOLE) for index in range(request.n)
        ]

    def encode(self, index: int, chunk: TokenChunk) -> bytes:
        """The events for one chunk, in one piece."""
        if chunk.finish_reason is None and self._is_plain and self._is_started[index]:
            return fill(self._frames[index], chunk.text) if chunk.text else b""
        events = ""
        if not self._is_started[index]:
            self._is_started[index] = True
            events += self.envelope.choice(self._role(index))
        if chunk.text or (chunk.token_ids and not self._is_plain):
            events += self.envelope.choice(self._content(index, chunk))
        if chunk.finish_reason is not None:
            last = _chunk_choice(index, {}, finish_reason=chunk.finish_reason.value)
            events += self.envelope.choice({**last, "stop_reason": chunk.stop_reason})
        return events.encode("ascii")

    def _role(self, index: int) -> dict[str, Any]:
        choice = _chunk_choice(index, {"role": "assistant", "content": ""})
        return {**choice, "prompt_token_ids": self._prompt.token_ids} if self._request.return_token_ids else choice

    def _content(self, index: int, chunk: TokenChunk) -> dict[str, Any]:
        choice = _chunk_choice(index, {"content": chunk.text})
        logprobs = _logprobs(self._request, chunk)
        if logprobs is not None:
            choice["logprobs"] = logprobs.model_dump()
        if self._request.return_token_ids:
            choice["token_ids"] = chunk.token_ids
        return choice


def _chunk_choice(index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
