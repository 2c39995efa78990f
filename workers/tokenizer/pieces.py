"""The bytes that each token stands for, where a token always stands for the same bytes.

That is so for the two families of tokenizers in use: byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece-style
BPE with byte fallback (Llama 2, Mistral). Then decoding is joining bytes, and decoding a stream needs no second
look at earlier tokens. A tokenizer of another kind has no table (:func:`piece_table` gives None).
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import re
from typing import Any

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SENTENCEPIECE_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

#: Error handler of the byte-fallback decoder, which writes one replacement character per byte.
_EACH_BYTE = "warmgraph.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others as characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """How tokens spell bytes.

    Attributes:
        byte_level: GPT-2's alphabet; otherwise SentencePiece's space and ``<0x..>`` tokens.
        errors: Error handler for bytes that are not UTF-8, so that the result is the full decoder's.
        strips_space: The text's first space is dropped, as it was added before encoding.
    """

    byte_level: bool
    errors: str = "replace"
    strips_space: bool = False


class PieceTable(dict[int, str | bytes]):
    """Token id to what it stands for: text if that is whole characters, else bytes. Filled on first use.

    Attributes:
        errors: Error handler for ``bytes.decode``.
        strips_space: The first space of a text is not part of it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, kind: _Kind, hidden: frozenset[str]) -> None:
        super().__init__()
        self.errors = kind.errors
        self.strips_space = kind.strips_space
        self._backend = backend
        self._kind = kind
        self._hidden = hidden

    def __missing__(self, token_id: int) -> str | bytes:
        token = self._backend.id_to_token(token_id)
        # Ids of padded embedding rows have no token.
        data = b"" if token is None or token in self._hidden else self._bytes(token)
        piece = self[token_id] = _whole_characters(data)
        return piece

    def _bytes(self, token: str) -> bytes:
        if self._kind.byte_level:
            values = [_ALPHABET.get(char, -1) for char in token]
            # A token with any other character, an added one, stands for itself.
            return token.encode() if -1 in values else bytes(values)
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(_SENTENCEPIECE_SPACE, " ").encode()


def _whole_characters(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def piece_table(backend: tokenizers.Tokenizer, hidden: frozenset[str]) -> PieceTable | None:
    """The table of a tokenizer, or None if its tokens have no bytes of their own.

    Args:
        backend: The tokenizer.
        hidden: Tokens that stand for nothing: the special ones, where they are to be skipped.
    """
    kind = _kind_of(backend)
    return None if kind is None else PieceTable(backend, kind, hidden)


def _kind_of(backend: tokenizers.Tokenizer) -> _Kind | None:
    if backend.decoder is None:
        return None
    config = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = config["decoders"] if config["type"] == "Sequence" else [config]
    names = [step["type"] for step in steps]
    if names in (["ByteLevel"], ["ByteLevel", "Fuse"], ["Fuse", "ByteLevel"]):
        return _Kind(byte_level=True)
    if names[:3] == ["Replace", "ByteFallback", "Fuse"] and _replaces_space(steps[0]):
        if not steps[3:]:
            return _Kind(byte_level=False, errors=_EACH_BYTE)
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if steps[3:] == [strip]:
            return _Kind(byte_level=False, errors=_EACH_BYTE, strips_space=True)
    return None


def _replaces_space(step: dict[str, Any]) -> bool:
    return bool(step["pattern"] == {"String": _SENTENCEPIECE_SPACE} and step["content"] == " ")
