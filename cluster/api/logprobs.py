"""Log-probabilities in the two shapes of the OpenAI API. Pure functions of the engine's chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.api.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from workers.outputs import Logprob, PositionLogprobs

#: JSON has no minus infinity; OpenAI writes this.
_LOWEST = -9999.0


def chat_logprobs(token_ids: Sequence[int], positions: Sequence[PositionLogprobs], num_top: int) -> ChatLogprobs:
    """One entry per token, with the ``num_top`` most likely tokens in its place."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        top = sorted((item for item in position.items() if item[1].rank <= num_top), key=lambda item: item[1].rank)
        chosen = _top_logprob(token_id, position[token_id])
        content.append(
            TokenLogprob(
                token=chosen.token,
                logprob=chosen.logprob,
                bytes=chosen.bytes,
                top_logprobs=[_top_logprob(*item) for item in top],
            )
        )
    return ChatLogprobs(content=content)


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    text_offset: int,
    decode: Callable[[int], str],
) -> CompletionLogprobs:
    """One entry per token in each list. A position without log-probabilities (the first of a prompt) has nulls.

    Args:
        token_ids: Tokens of the prompt (echo) or of the completion.
        positions: Their log-probabilities.
        text_offset: Characters of returned text before the first of them.
        decode: Text of a token that has no log-probabilities.
    """
    result = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token_id, position in zip(token_ids, positions, strict=True):
        token = decode(token_id) if position is None else _token(token_id, position[token_id])
        result.tokens.append(token)
        result.text_offset.append(text_offset)
        result.token_logprobs.append(None if position is None else max(position[token_id].logprob, _LOWEST))
        result.top_logprobs.append(None if position is None else _by_token(position))
        text_offset += len(token)
    return result


def _by_token(position: PositionLogprobs) -> dict[str, float]:
    """Token text to log-probability; of two tokens with the same text (parts of characters) the likelier."""
    result: dict[str, float] = {}
    for token_id, logprob in position.items():
        token = _token(token_id, logprob)
        result[token] = max(logprob.logprob, result.get(token, _LOWEST))
    return result


def _top_logprob(token_id: int, logprob: Logprob) -> TopLogprob:
    token = _token(token_id, logprob)
    encoded = None if "\N{REPLACEMENT CHARACTER}" in token else list(token.encode())
    return TopLogprob(token=token, logprob=max(logprob.logprob, _LOWEST), bytes=encoded)


def _token(token_id: int, logprob: Logprob) -> str:
    """The token's text; without a tokenizer its id, as vLLM writes it."""
    return f"token_id:{token_id}" if logprob.decoded_token is None else logprob.decoded_token
