"""POST /v1/completions: from the body to the response, streamed or whole."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.responses import Response

from cluster.api.client import ModelClient
from cluster.api.context import ApiContext, Arrival, start_generation
from cluster.api.generation import Generation
from cluster.api.logprobs import completion_logprobs
from cluster.api.prompts import TokenizedPrompt
from cluster.api.protocol import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from cluster.api.responses import CompletionChoice, CompletionLogprobs, CompletionResponse
from cluster.api.sampling import check_top_logprobs, resolve_max_tokens, sampling_params
from cluster.api.sse import ChunkEnvelope, EventStreamResponse, fill
from cluster.api.validation import parse_request
from workers.outputs import FinishReason, TokenChunk
from workers.sampling_params import SamplingParams

_HOLE = "\0"


async def create_completion(context: ApiContext, body: bytes) -> Response:
    """Answer one request.

    Raises:
        WarmgraphError: Anything that is answered with an error status.
    """
    arrival = Arrival.now("cmpl")
    request = parse_request(CompletionRequest, body)
    client = context.directory.lookup(request.model)
    check_top_logprobs(request.logprobs, "logprobs")
    prompts = await _read_prompts(context, request, client)
    params = [_params(request, client, prompt) for prompt in prompts]
    generation = start_generation(context, client, arrival, prompts, params)
    writer = _ChoiceWriter(request, client, prompts)
    if request.stream:
        return EventStreamResponse(_events(context, request, arrival, generation, writer))
    choices = [_Parts() for _ in generation.requests]
    async with aclosing(generation.chunks()) as chunks:
        async for index, chunk in chunks:
            choices[index].add(writer.write(index, chunk))
    response = CompletionResponse(
        id=arrival.id,
        created=arrival.created,
        model=request.model,
        choices=[parts.join() for parts in choices],
        usage=writer.usage(generation),
        system_fingerprint=context.settings.system_fingerprint,
    )
    return Response(response.model_dump_json(), media_type="application/json")


async def _read_prompts(context: ApiContext, request: CompletionRequest, client: ModelClient) -> list[TokenizedPrompt]:
    several = isinstance(request.prompt, list) and not isinstance(request.prompt[0], int)
    context.check_num_choices(len(request.prompt) if several else 1, request.n)
    return await context.prompts.read_completion(request, client)
