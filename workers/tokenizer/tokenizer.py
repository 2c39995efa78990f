"""A model's tokenizer: text to ids, ids to text, conversations to text.

Built on the ``tokenizers`` library alone. Every method may be called from several threads: nothing changes after
construction except caches, and the library releases the interpreter lock while it encodes. Knows no requests.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from workers.errors import InvalidRequestError
from workers.tokenizer.chat_template import ChatTemplate
from workers.tokenizer.loading import read_tokenizer
from workers.tokenizer.pieces import PieceTable, piece_table


class Tokenizer:
    """Encodes and decodes for one model.

    Args:
        backend: The library's tokenizer; truncation and padding must be off.
        special_tokens: Text of the named special tokens: ``bos_token``, ``eos_token``, ...
        chat_templates: Source by name.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._chat_template = ChatTemplate(chat_templates or {}, self.special_tokens)

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """The tokenizer of a checkpoint folder.

        Raises:
            ModelError: The folder has no tokenizer, or one that cannot be read.
        """
        files = read_tokenizer(Path(path))
        return cls(files.backend, files.special_tokens, files.chat_templates)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token(self) -> str | None:
        """Text of the beginning-of-sequence token."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the end-of-sequence token."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token."""
        return self._id_of(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token."""
        return self._id_of(self.eos_token)

    @functools.cached_property
    def all_special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``.

        Args:
            text: Special tokens written out in it are encoded as such.
            add_special_tokens: Add what the tokenizer puts around a text (BOS, for most models that have one).

        Raises:
            InvalidRequestError: ``text`` holds half of a surrogate pair, as broken JSON escapes give.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            if not isinstance(text, str):
                raise
            raise InvalidRequestError(
                "The text holds half of a surrogate pair, which is no character; remove it.", param="prompt"
            ) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become replacement characters."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_id(self, token_id: int) -> str:
        """Text of one token by itself, a special one included; a part of a character is a replacement character.

        Unlike ``decode([token_id])`` it keeps the space that a word begins with, so that the texts of tokens can
        be put together again.
        """
        pieces = self.pieces(skip_special_tokens=False)
        if pieces is None:
            return self.decode([token_id], skip_special_tokens=False)
        piece = pieces[token_id]
        return piece if isinstance(piece, str) else piece.decode(errors=pieces.errors)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as the model's chat template writes it; encode it without adding special tokens.

        Raises:
            InvalidRequestError: There is no template, or it refuses these messages.
        """
        return self._chat_template.render(messages, add_generation_prompt, tools, **kwargs)

    def pieces(self, skip_special_tokens: bool) -> PieceTable | None:
        """What each token stands for, or None if that depends on its neighbours. Shared, filled on use."""
        return self._visible_pieces if skip_special_tokens else self._all_pieces

    @functools.cached_property
    def _all_pieces(self) -> PieceTable | None:
        return piece_table(self.backend, frozenset())

    @functools.cached_property
    def _visible_pieces(self) -> PieceTable | None:
        added = self.backend.get_added_tokens_decoder()
        return piece_table(self.backend, frozenset(token.content for token in added.values() if token.special))

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)
