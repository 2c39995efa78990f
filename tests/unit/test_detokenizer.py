"""Incremental text equals the text of all tokens at once, cut where a stop string first becomes complete."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers

from tests.tokenizer_cases import byte_level_json, sentencepiece_json, texts, wordpiece_json
from workers.sampling_params import SamplingParams
from workers.tokenizer.detokenizer import IncrementalDetokenizer
from workers.tokenizer.stop_strings import StopStringMatcher
from workers.tokenizer.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(tokenizers.Tokenizer.from_str(byte_level_json(add_bos=True)))
SENTENCEPIECE = Tokenizer(tokenizers.Tokenizer.from_str(sentencepiece_json()))
WORDPIECE = Tokenizer(tokenizers.Tokenizer.from_str(wordpiece_json()))
MANY = hypothesis.settings(max_examples=200, deadline=None)

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def deltas(
    tokenizer: Tokenizer, ids: Sequence[int], *, prompt: Sequence[int] = (), chunks: int = 1, **params: Any
) -> tuple[list[str], str | None]:
    """Text by push (``chunks`` tokens each) and by the final flush, and the stop string."""
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(max_tokens=None, **params), prompt)
    written = []
    for start in range(0, len(ids), chunks):
        delta = detokenizer.push(ids[start : start + chunks])
        written.append(delta.text)
        if delta.stop_string is not None:
            return written, delta.stop_string
        assert delta.num_tokens == len(ids[start : start + chunks])
    return [*written, detokenizer.flush()], None


def token_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids at random, some of which have no token, as padded embedding rows do."""
    return st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40)


@hypothesis.given(token_ids(BYTE_LEVEL), st.booleans(), st.integers(1, 5), st.lists(st.integers(0, 300), max_size=3))
@MANY
def test_byte_level_deltas_add_up_to_the_full_decode(
    ids: list[int], skip_special_tokens: bool, chunks: int, prompt: list[int]
) -> None:
    written, _ = deltas(BYTE_LEVEL, ids, prompt=prompt, chunks=chunks, skip_special_tokens=skip_special_tokens)
    assert "".join(written) == BYTE_LEVEL.decode(ids, skip_special_tokens)


@hypothesis.given(texts())
@MANY
def test_real_text_comes_in_whole_characters(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    written, _ = deltas(BYTE_LEVEL, ids, skip_special_tokens=False)
    assert "".join(written) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in delta for delta in written)


def test_an_emoji_is_held_back_until_it_is_whole() -> None:
    ids = BYTE_LEVEL.encode("\N{ROCKET}!", add_special_tokens=False)
    assert len(ids) >= 3, "the test needs a character that is several tokens"
    written, _ = deltas(BYTE_LEVEL, ids)
    assert written[-2:] == ["!", ""]
    assert "".join(written[:-2]) == "\N{ROCKET}"


def test_broken_bytes_are_not_held_back_forever() -> None:
    lead = BYTE_LEVEL.backend.token_to_id("ð")  # 0xF0, the first byte of an emoji
    assert lead is not None
    written, _ = deltas(BYTE_LEVEL, [lead] * 100)
    assert "".join(written[:10]).count(REPLACEMENT) == 9
    assert "".join(written) == REPLACEMENT * 100


@hypothesis.given(texts(), texts())
@MANY
def test_sentencepiece_continues_the_prompt(prompt: str, text: str) -> None:
    """The text is what the whole sequence has beyond the prompt; the first word's space belongs to it."""
    prompt_ids = SENTENCEPIECE.encode(prompt)
    ids = SENTENCEPIECE.encode(text, add_special_tokens=False)
    written, _ = deltas(SENTENCEPIECE, ids, prompt=prompt_ids)
    before = SENTENCEPIECE.decode(prompt_ids)
    assert "".join(written) == SENTENCEPIECE.decode([*prompt_ids, *ids])[len(before) :]


@hypothesis.given(token_ids(SENTENCEPIECE), st.integers(1, 4))
@MANY
def test_sentencepiece_deltas_add_up_where_bytes_are_whole(ids: list[int], chunks: int) -> None:
    expected = SENTENCEPIECE.decode(ids)
    text = "".join(deltas(SENTENCEPIECE, ids, chunks=chunks)[0])
    # In a broken run of bytes, characters that were whole before the break stay (see _PieceStream).
    if REPLACEMENT not in expected:
        assert text == expected
    else:
        assert REPLACEMENT in text


@pytest.mark.parametrize("prompt", [[], [1]])
def test_sentencepiece_drops_the_space_at_the_very_start_only(prompt: list[int]) -> None:
    hello = SENTENCEPIECE.encode("Hello world", add_special_tokens=False)
    assert "".join(deltas(SENTENCEPIECE, hello, prompt=prompt)[0]) == "Hello world"
    follows = [*prompt, *SENTENCEPIECE.encode("a", add_special_tokens=False)]
    assert "".join(deltas(SENTENCEPIECE, hello, prompt=follows)[0]) == " Hello world"


@hypothesis.given(st.lists(st.integers(0, 8), max_size=12), st.lists(st.integers(1, 7), max_size=8), st.integers(1, 3))
@MANY
def test_tokens_without_text_of_their_own_are_decoded_in_context(
    ids: list[int], prompt: list[int], chunks: int
) -> None:
    written, _ = deltas(WORDPIECE, ids, prompt=prompt, chunks=chunks)
    whole = WORDPIECE.decode([*prompt, *ids])
    assert "".join(written) == whole[len(WORDPIECE.decode(prompt)) :]


def test_special_tokens_are_skipped_or_kept() -> None:
    ids = BYTE_LEVEL.encode("a<|im_end|>b<think>", add_special_tokens=False)
    assert "".join(deltas(BYTE_LEVEL, ids)[0]) == "ab<think>"
    assert "".join(deltas(BYTE_LEVEL, ids, skip_special_tokens=False)[0]) == "a<|im_end|>b<think>"


def test_a_token_that_ended_the_request_has_no_text() -> None:
    ids = BYTE_LEVEL.encode("ab!", add_special_tokens=False)
    for include, expected in ((False, "ab"), (True, "ab!")):
        params = SamplingParams(include_stop_str_in_output=include)
        detokenizer = IncrementalDetokenizer(BYTE_LEVEL, params, ())
        delta = detokenizer.push(ids, stop_terminated=True)
        assert (delta.text + detokenizer.flush(), delta.num_tokens) == (expected, len(ids))


# Stop strings.


def cut_by_brute_force(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the stop string that is complete first, and of those the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


stop_lists = st.lists(st.text("ab\n😀", min_size=1, max_size=4), min_size=1, max_size=4)


@hypothesis.given(st.text("ab\n😀 ", max_size=30), stop_lists, st.booleans(), st.integers(1, 7))
@hypothesis.settings(max_examples=400, deadline=None)
def test_stop_strings_cut_where_they_are_first_complete(
    text: str, stops: list[str], include: bool, chunks: int
) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    written, stop = deltas(BYTE_LEVEL, ids, chunks=chunks, stop=stops, include_stop_str_in_output=include)
    assert ("".join(written), stop) == cut_by_brute_force(text, stops, include)


@hypothesis.given(st.text("ab ", max_size=30), stop_lists)
@MANY
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopStringMatcher(tuple(stops), include_in_output=False)
    written = ""
    for index, char in enumerate(text):
        delta, stop = matcher.feed(char)
        written += delta
        if stop is not None:
            return
        seen = text[: index + 1]
        candidates = [stop[:n] for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])]
        assert written == seen[: len(seen) - max(map(len, candidates))]


def test_text_that_was_not_a_stop_string_after_all_is_written() -> None:
    ids = BYTE_LEVEL.encode("x<b>y<|", add_special_tokens=False)
    written, stop = deltas(BYTE_LEVEL, ids, stop=["<b/>", "<|end"])
    assert "".join(written) == "x<b>y<|"
    assert written[-1] == "<|"
    assert stop is None


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, ""), (1, "ab"), (2, "abab"), (99, "ababab")])
def test_stop_strings_do_not_count_within_min_tokens(min_tokens: int, expected: str) -> None:
    token = BYTE_LEVEL.encode("ab", add_special_tokens=False)
    ids = token * 3
    num = len(token)
    written, _ = deltas(BYTE_LEVEL, ids, stop=["ab"], min_tokens=min_tokens * num)
    assert "".join(written) == expected


def test_a_push_says_how_many_tokens_it_used() -> None:
    ids = BYTE_LEVEL.encode("a.b.c", add_special_tokens=False)
    delta = IncrementalDetokenizer(BYTE_LEVEL, SamplingParams(stop="b"), ()).push(ids)
    assert (delta.text, delta.stop_string) == ("a.", "b")
    assert BYTE_LEVEL.decode(ids[: delta.num_tokens]) == "a.b"


@pytest.mark.model
def test_the_default_models_deltas_add_up(default_model: Path) -> None:
    tokenizer = Tokenizer.from_folder(default_model)
    real = texts().map(lambda text: tokenizer.encode(text, add_special_tokens=False))

    @hypothesis.given(st.one_of(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30), real))
    @hypothesis.settings(max_examples=100, deadline=None)
    def check(ids: list[int]) -> None:
        for skip in (True, False):
            written, _ = deltas(tokenizer, ids, skip_special_tokens=skip)
            assert "".join(written) == tokenizer.decode(ids, skip)

    check()
