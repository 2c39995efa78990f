"""POST /v1/completions: from the body to the response, streamed or whole."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from cluster.api.body import read_json_body
from cluster.api.client import ModelClient
from cluster.api.context import ApiContext, Arrival, start_generation
from cluster.api.logprobs import completion_logprobs
from cluster.api.prompts import TokenizedPrompt
from cluster.api.protocol import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from cluster.api.responses import CompletionChoice, CompletionLogprobs, CompletionResponse
from cluster.api.sampling import check_top_logprobs, resolve_max_tokens, sampling_params
from cluster.api.sse import ChunkEnvelope, EventStreamResponse, fill
from cluster.api.validation import parse_request
from workers.outputs import TokenChunk
from workers.sampling_params import SamplingParams

_HOLE = "\0"


async def create_completion(context: ApiContext, http_request: Request) -> Response:
    """Answer one request.

    Raises:
        WarmgraphError: Anything that is answered with an error status.
    """
    arrival = Arrival.now("cmpl")
    caller = context.admit(http_request)
    body = await read_json_body(http_request, context.settings.max_body_bytes)
    request = parse_request(CompletionRequest, body)
    client = context.directory.lookup(request.model)
    check_top_logprobs(request.logprobs, "logprobs")
    several = isinstance(request.prompt, list) and not isinstance(request.prompt[0], int)
    context.check_num_choices(len(request.prompt) if several else 1, request.n)
    prompts = await context.prompts.read_completion(request, client)
    params = [_params(request, client, prompt) for prompt in prompts]
    is_scoring = request.max_tokens == 0
    generation = start_generation(context, client, arrival, caller, prompts, params, discard_output=is_scoring)
    choices = _ChoiceWriter(request, client, prompts)
    head = {
        "id": arrival.id,
        "object": "text_completion",
        "created": arrival.created,
        "model": client.name,
        "system_fingerprint": context.settings.system_fingerprint,
    }
    if request.stream:
        envelope = ChunkEnvelope(head, include_usage=request.include_usage)
        return EventStreamResponse(generation, _CompletionEncoder(envelope, choices))
    chunks = await generation.collect()
    response = CompletionResponse(
        id=arrival.id,
        created=arrival.created,
        model=client.name,
        choices=[choices.write(index, chunk) for index, chunk in enumerate(chunks)],
        usage=generation.usage(),
        system_fingerprint=context.settings.system_fingerprint,
    )
    return Response(response.model_dump_json(), media_type="application/json")


def _params(request: CompletionRequest, client: ModelClient, prompt: TokenizedPrompt) -> SamplingParams:
    max_tokens = resolve_max_tokens(
        len(prompt.token_ids),
        client.max_model_len,
        request.max_tokens or (None if request.max_tokens is None else 1),
        param="max_tokens",
        default=DEFAULT_COMPLETION_TOKENS,
    )
    prompt_logprobs = request.logprobs if request.echo else None
    return sampling_params(request, client, max_tokens, logprobs=request.logprobs, prompt_logprobs=prompt_logprobs)


class _ChoiceWriter:
    """Turns a chunk, or a whole completion as one chunk, into a choice; remembers what each choice already got."""

    def __init__(self, request: CompletionRequest, client: ModelClient, prompts: list[TokenizedPrompt]) -> None:
        self._request = request
        self._tokenizer = client.tokenizer
        self._prompts = prompts
        self._return_token_ids = request.return_token_ids or (
            request.return_token_ids is None and client.tokenizer is None
        )
        self._text_offsets = [0] * (len(prompts) * request.n)
        self.is_plain = request.logprobs is None and not self._return_token_ids
        self.is_started = [False] * len(self._text_offsets)

    def write(self, index: int, chunk: TokenChunk) -> CompletionChoice:
        """The choice, with the prompt before its first text if the request asks for an echo."""
        is_first = not self.is_started[index]
        self.is_started[index] = True
        prompt = self._prompts[index // self._request.n]
        echoed = prompt if is_first and self._request.echo else None
        choice = CompletionChoice(
            index=index,
            text=chunk.text if echoed is None else echoed.text + chunk.text,
            logprobs=self._logprobs(index, chunk, echoed),
            finish_reason=None,
        )
        if chunk.finish_reason is not None:
            choice.finish_reason = chunk.finish_reason.value  # type: ignore[assignment]  # errors were raised before
            choice.stop_reason = chunk.stop_reason
        if self._return_token_ids:
            choice.token_ids = chunk.token_ids
            if is_first:
                choice.prompt_token_ids = prompt.token_ids
        return choice

    def _logprobs(self, index: int, chunk: TokenChunk, echoed: TokenizedPrompt | None) -> CompletionLogprobs | None:
        if self._request.logprobs is None:
            return None
        token_ids, positions = chunk.token_ids, [*(chunk.logprobs or ())]
        if echoed is not None:
            token_ids = echoed.token_ids + token_ids
            positions = [*(chunk.prompt_logprobs or ()), *positions]
        result = completion_logprobs(token_ids, positions, self._text_offsets[index], self._decode)
        if result.tokens:
            self._text_offsets[index] = result.text_offset[-1] + len(result.tokens[-1])
        return result

    def _decode(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokenizer is None else self._tokenizer.convert_id(token_id)


class _CompletionEncoder:
    """Writes the stream's events."""

    def __init__(self, envelope: ChunkEnvelope, choices: _ChoiceWriter) -> None:
        self.envelope = envelope
        self._choices = choices
        self._frames = [
            envelope.text_frame({"index": index, "text": _HOLE, "logprobs": None, "finish_reason": None}, _HOLE)
            for index in range(len(choices.is_started))
        ]

    def encode(self, index: int, chunk: TokenChunk) -> bytes:
        """One event, or none while there is neither text nor anything else to tell."""
        choices = self._choices
        if chunk.finish_reason is None and choices.is_plain and choices.is_started[index]:
            return fill(self._frames[index], chunk.text) if chunk.text else b""
        choice = choices.write(index, chunk)
        if choices.is_plain and not choice.text and chunk.finish_reason is None:
            return b""
        return self.envelope.choice(choice.model_dump(exclude_unset=True)).encode("ascii")
