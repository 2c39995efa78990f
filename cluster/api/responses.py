"""Response bodies of the OpenAI API, and the few fields that vLLM adds (``stop_reason``, token ids).

The models define the wire format, for the documentation and for what is not hot. The hot path of a stream
(:mod:`cluster.api.sse`) writes the same bytes without them; a test holds the two together.
"""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

FinishReasonField = Literal["stop", "length"]


class _Response(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(protected_namespaces=(), extra="forbid")


class PromptTokensDetails(_Response):
    """Breakdown of the prompt."""

    cached_tokens: int = Field(description="Prompt tokens that were served from the prefix cache.")


class Usage(_Response):
    """Tokens of a request; a prompt counts once, whatever ``n``."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(_Response):
    """Log-probabilities of /v1/completions; one entry per token in each list.

    ``text_offset`` counts characters from the start of the returned text.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(_Response):
    """One completion. Also the choice of a streamed chunk, where ``text`` is what is new."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReasonField | None = None
    stop_reason: int | str | None = Field(default=None, description="The stop string or stop token id that matched.")
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(_Response):
    """Answer of POST /v1/completions, and a chunk of its stream (which has ``usage`` on the last one only)."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class TopLogprob(_Response):
    """One likely token."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8 of the token; null if it is part of a character.")


class TokenLogprob(TopLogprob):
    """A generated token and the most likely ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Response):
    """Log-probabilities of a chat completion."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(_Response):
    """The generated message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Response):
    """One chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReasonField
    stop_reason: int | str | None = Field(default=None, description="The stop string or stop token id that matched.")
    token_ids: list[int] | None = None


class ChatCompletionResponse(_Response):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = None


class ChatDelta(_Response):
    """What is new in a streamed message: the role first, then text, and at last nothing."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Response):
    """One choice of a streamed chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReasonField | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = Field(default=None, description="With the role, if asked for.")


class ChatCompletionChunk(_Response):
    """One event of a streamed chat completion. The usage chunk has no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(_Response):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "warmgraph"
    max_model_len: int = Field(description="Longest prompt plus output, in tokens.")


class ModelList(_Response):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(_Response):
    """What went wrong and what to change."""

    message: str
    type: str
    param: str | None = Field(description="The parameter at fault.")
    code: str


class ErrorResponse(_Response):
    """Every answer with a status of 400 or more; in a stream, the last event."""

    error: ErrorDetail


class HealthResponse(_Response):
    """Answer of GET /health."""

    status: Literal["ok", "unavailable"]
    models: dict[str, Literal["ready", "not_ready"]]


class ServeState(_Response):
    """What Ray Serve says of a model's replicas."""

    status: str
    message: str = Field(description="Why replicas do not start, if they do not.")
    replicas: dict[str, int] = Field(description="Number of replicas by state.")


class ModelStatus(_Response):
    """One model in the answer of GET /status."""

    is_ready: bool
    deployment: ServeState | None
    replicas: dict[str, dict[str, Any]] = Field(
        description="By replica id: 'state' is the load after the last step, 'graphs' the account of captured graphs, "
        "'startup' that of the start."
    )


class StatusResponse(_Response):
    """Answer of GET /status."""

    models: dict[str, ModelStatus]


class VersionResponse(_Response):
    """Answer of GET /version."""

    version: str
