"""From sampled token ids to chunks of text: detokenisation, stop strings, logprobs.

Knows tokens and text of live requests; the scheduler stays the judge of when a request ends, and is told of stop
strings by the engine.
"""

from __future__ import annotations

import dataclasses

from workers.outputs import FinishReason, Logprob, PositionLogprobs, TokenChunk
from workers.request import Request
from workers.tokenizer.detokenizer import IncrementalDetokenizer
from workers.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(slots=True)
class _LiveRequest:
    """Output state of one request.

    Attributes:
        detokenizer: None when no text is wanted.
        prompt_logprobs: Collected chunk by chunk of the prefill; None when not asked for, or already sent.
        is_first: Whether nothing has been sent yet.
    """

    detokenizer: IncrementalDetokenizer | None
    prompt_logprobs: list[PositionLogprobs | None] | None
    is_first: bool = True


class OutputProcessor:
    """Turns each step's tokens into one :class:`TokenChunk` per request.

    Args:
        tokenizer: None serves token ids only.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._live: dict[str, _LiveRequest] = {}

    def add(self, request: Request) -> None:
        """Start following a request; tokens it resumes from count as already sent."""
        detokenizer = None
        if self._tokenizer is not None and request.params.detokenize:
            prompt_ids = request.token_ids[: request.num_prompt_tokens].tolist()
            detokenizer = IncrementalDetokenizer(self._tokenizer, request.params, prompt_ids)
            if request.num_output_tokens:
                detokenizer.push(request.output_token_ids)
        wants_prompt = request.params.prompt_logprobs is not None
        self._live[request.request_id] = _LiveRequest(detokenizer, [None] if wants_prompt else None)

    def remove(self, request_id: str) -> None:
        """Stop following a request that was aborted; unknown ids are finished already."""
        self._live.pop(request_id, None)

    def add_prompt_logprobs(self, request_id: str, first_position: int, logprobs: list[PositionLogprobs]) -> None:
        """Collect the logprobs of a prefill chunk's tokens; a chunk computed again after a preemption adds nothing."""
        live = self._live.get(request_id)
        if live is not None and live.prompt_logprobs is not None:
            known = len(live.prompt_logprobs) - first_position
            assert known >= 0, "prompt logprobs arrive in order"
            live.prompt_logprobs.extend(self._decode(position) for position in logprobs[known:])

    def process(
        self, request: Request, token_ids: list[int], logprobs: list[PositionLogprobs] | None
    ) -> tuple[TokenChunk, str | None]:
        """Make the chunk for new tokens of ``request``.

        Returns:
            The chunk, and the stop string that its text ran into, if any: then the request must be finished.
        """
        live = self._live[request.request_id]
        chunk = TokenChunk(request.request_id, token_ids)
        stop_string = None
        if live.detokenizer is not None:
            delta = live.detokenizer.push(token_ids, stop_terminated=request.finish_reason is FinishReason.STOP)
            chunk.text, stop_string = delta.text, delta.stop_string
        if logprobs is not None:
            chunk.logprobs = [self._decode(position) for position in logprobs]
        if live.is_first:
            live.is_first = False
            chunk.num_cached_tokens = request.num_cached_tokens
            chunk.prompt_logprobs, live.prompt_logprobs = live.prompt_logprobs, None
        if request.finish_reason is not None or stop_string is not None:
            self._finish(chunk, request, live, stop_string)
        return chunk, stop_string

    def _finish(self, chunk: TokenChunk, request: Request, live: _LiveRequest, stop_string: str | None) -> None:
        del self._live[request.request_id]
        if stop_string is not None:
            chunk.finish_reason, chunk.stop_reason = FinishReason.STOP, stop_string
            return
        chunk.finish_reason, chunk.stop_reason = request.finish_reason, request.stop_reason
        if live.detokenizer is not None:
            chunk.text += live.detokenizer.flush()

    def _decode(self, position: PositionLogprobs) -> PositionLogprobs:
        if self._tokenizer is None:
            return position
        text = self._tokenizer.convert_id
        return {token_id: Logprob(entry.logprob, entry.rank, text(token_id)) for token_id, entry in position.items()}
