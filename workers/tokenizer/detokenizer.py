"""The text of one request as its tokens arrive: whole characters only, cut at stop strings.

Knows tokens and text; when a request ends for other reasons (EOS, stop tokens, length) is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from workers.sampling_params import SamplingParams
from workers.tokenizer.stop_strings import StopStringMatcher
from workers.tokenizer.text_stream import make_text_stream
from workers.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class DetokenizedDelta:
    """Text that one or more tokens added.

    Attributes:
        text: May be empty while a character or a possible stop string is incomplete.
        stop_string: The stop string that ended the text, or None.
        num_tokens: Tokens read: all of them, or those up to the one that completed the stop string.
    """

    text: str
    stop_string: str | None = None
    num_tokens: int = 0


class IncrementalDetokenizer:
    """Detokenises one completion.

    The deltas and the flushed rest, put together, are the text of all its tokens (cut at the stop string).

    Args:
        tokenizer: The model's.
        params: Stop strings, ``include_stop_str_in_output``, ``skip_special_tokens``, ``min_tokens``.
        prompt_token_ids: The prompt; not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        assert params.detokenize, "the request wants no text"
        self._stream = make_text_stream(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._matcher = None
        if params.stop_strings:
            self._matcher = StopStringMatcher(params.stop_strings, params.include_stop_str_in_output)
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int], *, stop_terminated: bool = False) -> DetokenizedDelta:
        """Read the next tokens.

        Args:
            token_ids: In order.
            stop_terminated: The last of them is EOS or a stop token that ended the request: it has no text,
                unless ``include_stop_str_in_output`` (as in vLLM).

        Returns:
            The new text. After one with a stop string nothing more may be pushed or flushed.
        """
        num_with_text = len(token_ids) - (1 if stop_terminated and not self._include_stop else 0)
        parts: list[str] = []
        for index in range(num_with_text):
            text = self._stream.feed(token_ids[index])
            self._num_tokens += 1
            if self._matcher is not None:
                # As in vLLM, a stop string counts only if it is completed after the first min_tokens tokens.
                text, stop = self._matcher.feed(text, self._num_tokens > self._min_tokens)
                if stop is not None:
                    return DetokenizedDelta("".join((*parts, text)), stop, index + 1)
            parts.append(text)
        return DetokenizedDelta("".join(parts), None, len(token_ids))

    def flush(self) -> str:
        """The text held back, at the end of the request; stop strings are not looked for any more."""
        held = self._matcher.flush() if self._matcher is not None else ""
        return held + self._stream.finish()
