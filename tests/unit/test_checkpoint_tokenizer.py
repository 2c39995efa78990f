"""Tokenizers built from GGUF vocabularies, on small vocabularies whose right answer can be read off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.model_fixtures import write_tiny_gguf
from workers.checkpoint.gguf_file import GGUFFile
from workers.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer, hf_tokenizer_config, merges_from_scores
from workers.errors import ModelError


def _build(path: Path, **changes: Any) -> Tokenizer:
    with GGUFFile(write_tiny_gguf(path / "m.gguf", **changes)) as file:
        return build_tokenizer(file)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _build(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hello", ["hello"]),
        # Digits stand alone although the vocabulary has the merges "1 2" and "1 .".
        ("12", ["1", "2"]),
        ("\n\n1.", ["ĊĊ", "1", "."]),
        ("hello w12", ["hello", "Ġw", "1", "2"]),
        ("\n\n12", ["ĊĊ", "1", "2"]),
        # Every kind of number is a digit here, as in the tokenizers library's Digits.
        ("½h", ["Â", "½", "h"]),
        ("<|im_start|>hello<|im_end|>", ["<|im_start|>", "hello", "<|im_end|>"]),
        ("<think>he", ["<think>", "he"]),
        ("<|im_star", ["<", "|", "i", "m", "_", "s", "t", "a", "r"]),
    ],
)
def test_smollm_splits_digits_off(smollm: Tokenizer, text: str, tokens: list[str]) -> None:
    assert smollm.encode(text).tokens == tokens


@given(text=st.text(max_size=60))
def test_byte_level_round_trip(smollm: Tokenizer, text: str) -> None:
    assert smollm.decode(smollm.encode(text).ids, skip_special_tokens=False) == text


def test_control_tokens_are_special_and_user_defined_ones_are_not(smollm: Tokenizer) -> None:
    ids = smollm.encode("<think>hello<|im_end|>").ids
    assert smollm.decode(ids) == "<think>hello"


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["12", "3", ".", "Ċ", "Ċ"]),
        ("llama-bpe", ["12", "3", ".", "ĊĊ"]),
        ("qwen2", ["1", "2", "3", ".", "ĊĊ"]),
    ],
)
def test_other_pre_tokenizers(tmp_path: Path, pre: str, tokens: list[str]) -> None:
    built = _build(tmp_path, tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=False)
    # Under GPT-2's rule the last white space before a word stands alone.
    assert built.encode("123.\n\nh").tokens == [*tokens, "h"]


def test_qwen2_normalises(tmp_path: Path) -> None:
    built = _build(tmp_path, tokenizer__ggml__pre="qwen2")
    assert built.encode("e\u0301").ids == built.encode("\u00e9").ids


def test_llama3_takes_a_whole_word_from_the_vocabulary(tmp_path: Path) -> None:
    merges = ["h e", "l l", "he ll"]  # "hello" is in the vocabulary, but no merge leads to it
    changes = {"tokenizer__ggml__merges": merges, "tokenizer__ggml__add_bos_token": False}
    assert _build(tmp_path, tokenizer__ggml__pre="llama-bpe", **changes).encode("hello").tokens == ["hello"]
    assert _build(tmp_path, tokenizer__ggml__pre="qwen2", **changes).encode("hello").tokens == ["hell", "o"]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_begin_of_sequence(tmp_path: Path, pre: str) -> None:
    def first(**changes: bool) -> bool:
        return _build(tmp_path, tokenizer__ggml__pre=pre, **changes).encode("h").tokens[0] == "<|im_start|>"

    assert first() is PRE_TOKENIZERS[pre].add_bos
    assert first(tokenizer__ggml__add_bos_token=True)
    assert not first(tokenizer__ggml__add_bos_token=False)


def test_begin_and_end_of_a_pair(tmp_path: Path) -> None:
    built = _build(tmp_path, tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True)
    assert built.encode("h").tokens == ["<|im_start|>", "h", "<|im_end|>"]
    assert built.encode("h", add_special_tokens=False).tokens == ["h"]
    assert built.encode("h", "e").tokens == ["<|im_start|>", "h", "<|im_end|>", "<|im_start|>", "e", "<|im_end|>"]


def test_tokenizer_config(tmp_path: Path) -> None:
    with GGUFFile(write_tiny_gguf(tmp_path / "m.gguf")) as file:
        config = hf_tokenizer_config(file, 256)
    assert config["chat_template"].startswith("{% for m in messages %}")
    assert {name: config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")} == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": None,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer__ggml__pre": "mystery"}, "pre-tokenizer 'mystery'; supported are gpt-2, smollm"),
        ({"tokenizer__ggml__pre": None}, "pre-tokenizer 'default'"),
        ({"tokenizer__ggml__model": "t5"}, "tokenizer of kind 't5'; supported are gpt2 and llama"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, "duplicates"),
        ({"tokenizer__ggml__tokens": None}, "no vocabulary"),
        ({"tokenizer__ggml__tokens": [1, 2]}, "no vocabulary"),
        ({"tokenizer__ggml__merges": ["h zzz"]}, "merges that are not in its vocabulary"),
        ({"tokenizer__ggml__merges": ["h"]}, "merges that are not in its vocabulary"),
        ({"tokenizer__ggml__model": "llama"}, "score for each"),
        ({"tokenizer__ggml__bos_token_id": 10**6, "tokenizer__ggml__add_bos_token": True}, "bos token 1000000 is not"),
    ],
)
def test_broken_vocabularies_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _build(tmp_path, **changes)


# --- SentencePiece vocabularies (Llama 2, Mistral 7B) ---------------------------------------------------------------

_PIECES = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0} | {f"<0x{byte:02X}>": 0.0 for byte in range(256)}
_PIECES |= {"▁a": -1.0, "ab": -2.0, "▁ab": -3.0, "▁": -10.0, "a": -11.0, "b": -12.0}


def _sentencepiece(path: Path, **changes: Any) -> Tokenizer:
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + 256 * [TokenType.BYTE]
    types += [TokenType.NORMAL] * (len(_PIECES) - len(types))
    return _build(
        path,
        tokenizer__ggml__model="llama",
        tokenizer__ggml__tokens=list(_PIECES),
        tokenizer__ggml__scores=list(_PIECES.values()),
        tokenizer__ggml__token_type=[int(kind) for kind in types],
        **changes,
    )


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


def test_sentencepiece(sentencepiece: Tokenizer) -> None:
    # "▁a" has a better score than "ab", so it is merged first; what is not in the vocabulary becomes bytes.
    assert sentencepiece.encode("ab b\n").tokens == ["<s>", "▁ab", "▁", "b", "<0x0A>"]
    assert sentencepiece.encode("bab").tokens == ["<s>", "▁", "b", "ab"]
    assert sentencepiece.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert sentencepiece.encode("</s>", add_special_tokens=False).tokens == ["</s>"]


@given(text=st.text(max_size=40))
def test_sentencepiece_round_trip(sentencepiece: Tokenizer, text: str) -> None:
    # SentencePiece cannot tell its own mark from a space.
    assert sentencepiece.decode(sentencepiece.encode(text).ids) == text.replace("▁", " ")


def test_sentencepiece_without_a_space_in_front(tmp_path: Path) -> None:
    built = _sentencepiece(tmp_path, tokenizer__ggml__add_space_prefix=False, tokenizer__ggml__add_bos_token=False)
    assert built.encode("ab").tokens == ["ab"]
    assert built.decode(built.encode(" ab").ids) == " ab"


def test_merges_come_best_score_first() -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "aba": 3, "ba": 4}
    assert merges_from_scores(vocab, [0.0, 0.0, -2.0, -3.0, -1.0]) == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]
