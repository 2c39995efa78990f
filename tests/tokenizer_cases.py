"""Small tokenizers of the kinds that real models have, trained on the spot, and text to try them on."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SAMPLES = (
    "Hello, world!",
    "  two spaces, a\ttab\n\nand 1234567 digits",
    "naïve café, Größe, 你好世界, こんにちは, مرحبا",
    "emoji: 😀 👩‍👩‍👧‍👦 🇪🇺 👍🏽 end",
    "<|im_start|>user\nhi<|im_end|>\n",
    "def f(x):\n    return x**2  # squared",
    "e\u0301 combining, \u200b zero width, \u00a0 nbsp",
    "",
    " ",
    "a",
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def byte_level_json(add_bos: bool = False, qwen_like: bool = False) -> str:
    """tokenizer.json of a byte-level BPE, as Llama 3 (BOS by post-processor) or Qwen (NFC, no BOS) have."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=add_bos))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if qwen_like:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*SAMPLES, *SAMPLES], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("é¡", normalized=False)])
    if add_bos:
        bos = [("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        template = processors.TemplateProcessing(single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=bos)
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return str(tokenizer.to_str())


@functools.cache
def sentencepiece_json() -> str:
    """tokenizer.json in the manner of Llama 2: spaces as U+2581, bytes as <0x..> tokens, BOS."""
    words = ["▁", "▁Hello", "Hello", ",", "▁world", "!", "▁a", "a", "b", "▁▁", "é", "\n", "你"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return str(tokenizer.to_str())


@functools.cache
def wordpiece_json() -> str:
    """tokenizer.json whose tokens have no text of their own: WordPiece joins them with or without a space."""
    words = ["[UNK]", "hello", "##ing", "##s", "world", "say", ",", "a"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return str(tokenizer.to_str())


def write_folder(folder: Path, tokenizer_json: str, **config: Any) -> Path:
    """A checkpoint folder with nothing but a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def texts() -> st.SearchStrategy[str]:
    """Text of any language, emoji included, without lone surrogates."""
    return st.one_of(st.sampled_from(SAMPLES), st.text(st.characters(codec="utf-8"), max_size=30))
