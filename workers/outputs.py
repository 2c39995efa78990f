"""What the engine hands out: per-step chunks for streaming, whole outputs for the offline front.

Plain dataclasses that cross threads and processes; field names of ``RequestOutput`` and ``CompletionOutput``
are vLLM's, so that scripts written for its ``LLM`` read them unchanged.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence


class FinishReason(enum.StrEnum):
    """Why a completion ended; values are OpenAI's where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of one token at one position.

    Attributes:
        logprob: From the raw logits, before penalties and temperature.
        rank: 1 for the most likely token of the vocabulary, 2 for the next, ...
        decoded_token: The token as text, or None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


#: Alternatives at one position: token id -> Logprob. The chosen (or prompt) token comes first.
PositionLogprobs = dict[int, Logprob]


@dataclasses.dataclass(slots=True)
class TokenChunk:
    """What one engine step added to one request. Filled by the engine's output processor.

    Attributes:
        request_id: The id given to ``Engine.add_request``.
        token_ids: New tokens; stop tokens are included, as they count as generated.
        text: New text; may be empty while a character or a possible stop string is incomplete.
        logprobs: One entry per token in ``token_ids``, or None if not asked for.
        prompt_logprobs: On the first chunk only, if asked for; entry 0 is None (nothing predicts it).
        finish_reason: Set on the last chunk of a request.
        stop_reason: The stop string or stop token id that ended it, or None (EOS, length).
        num_cached_tokens: Prompt tokens served from the prefix cache; set on the first chunk.
        error: One sentence, set when ``finish_reason`` is ERROR.
    """

    request_id: str
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int | None = None
    error: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it has tokens and text and nothing else, as nearly every chunk of a decode step."""
        return (
            self.finish_reason is None
            and self.logprobs is None
            and self.num_cached_tokens is None
            and self.prompt_logprobs is None
            and self.stop_reason is None
            and self.error is None
        )

    @property
    def rest(self) -> tuple[object, ...]:
        """All fields after ``text``, in order."""
        return (
            self.logprobs,
            self.prompt_logprobs,
            self.finish_reason,
            self.stop_reason,
            self.num_cached_tokens,
            self.error,
        )


def join_chunks(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """Consecutive chunks of one request, at least one, as one."""
    first, last = chunks[0], chunks[-1]
    logprobs = [position for chunk in chunks for position in chunk.logprobs or ()]
    return TokenChunk(
        request_id=first.request_id,
        token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
        text="".join(chunk.text for chunk in chunks),
        logprobs=logprobs or None,
        prompt_logprobs=first.prompt_logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        num_cached_tokens=first.num_cached_tokens,
        error=last.error,
    )


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One completion of one prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[PositionLogprobs] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """Everything generated for one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None
