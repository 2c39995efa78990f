"""Token ids to text, one token at a time, never half a character.

What the streams write, put together, is what decoding all the tokens at once gives. Bytes that cannot become a
character any more are written as replacement characters as soon as that is certain, so a run of broken bytes holds
back at most three of them.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from workers.tokenizer.pieces import REPLACEMENT, PieceTable
from workers.tokenizer.tokenizer import Tokenizer

#: Prompt tokens that a windowed stream decodes along, for the space before its first word (vLLM's number).
_NUM_CONTEXT_TOKENS = 5
#: A character is at most four bytes, so at most four tokens.
_MAX_TOKENS_PER_CHARACTER = 4


class TextStream(Protocol):
    """Decodes one completion."""

    def feed(self, token_id: int) -> str:
        """Text that became complete with this token."""
        ...

    def finish(self) -> str:
        """What is left when no token follows."""
        ...


def make_text_stream(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> TextStream:
    """The stream that suits the tokenizer.

    Args:
        tokenizer: Whose ids are decoded.
        prompt_token_ids: What comes before; decides whether the first word's space belongs to the text.
        skip_special_tokens: Special tokens give no text.
    """
    pieces = tokenizer.pieces(skip_special_tokens)
    if pieces is not None:
        return _PieceStream(pieces, prompt_token_ids)
    return _WindowStream(tokenizer, prompt_token_ids, skip_special_tokens)


class _PieceStream:
    """For tokenizers whose tokens stand for bytes: joins them and decodes UTF-8.

    One difference to decoding everything at once: a byte-fallback decoder turns a whole run of byte tokens into
    replacement characters if any of it is broken; here characters that were complete before the break stay.
    """

    def __init__(self, pieces: PieceTable, prompt_token_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._pending = b""
        self._strip = pieces.strips_space and not any(pieces[token_id] for token_id in prompt_token_ids)

    def feed(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if not self._pending and isinstance(piece, str):
            return self._strip_first(piece) if self._strip else piece
        data = self._pending + (piece.encode() if isinstance(piece, str) else piece)
        text, num_read = codecs.utf_8_decode(data, self._pieces.errors, False)
        self._pending = data[num_read:]
        return self._strip_first(text) if self._strip else text

    def finish(self) -> str:
        text, self._pending = self._pending.decode(errors=self._pieces.errors), b""
        return text

    def _strip_first(self, text: str) -> str:
        self._strip = not text
        return text.removeprefix(" ")


class _WindowStream:
    """For any other tokenizer: decode a window of tokens with and without the newest ones, and compare.

    This is the method of Hugging Face's text-generation-inference (and of vLLM for slow tokenizers).
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        #: Tokens whose text was written, for context, followed by those held back.
        self._window = list(prompt_token_ids[-_NUM_CONTEXT_TOKENS:])
        self._num_written = len(self._window)

    def feed(self, token_id: int) -> str:
        self._window.append(token_id)
        num_held = len(self._window) - self._num_written
        text = self._new_text()
        if not text or (text.endswith(REPLACEMENT) and num_held < _MAX_TOKENS_PER_CHARACTER):
            return ""
        # Tokens just written are the context of the next ones.
        self._window = self._window[self._num_written :]
        self._num_written = len(self._window)
        return text

    def finish(self) -> str:
        text = self._new_text()
        self._num_written = len(self._window)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._window[: self._num_written], self._skip)
        return self._tokenizer.decode(self._window, self._skip)[len(before) :]
