"""Builds a Hugging Face tokenizer from the vocabulary, merges and special tokens in a GGUF header.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``) and leaves its rules to the reader; they are in
``PRE_TOKENIZERS``. An unknown name is refused: guessing gives token ids that look right and mostly are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from workers.checkpoint.gguf_file import GGUFFile, Metadata
from workers.errors import ModelError

_SPACE = "\u2581"  # how SentencePiece spells a space

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before byte-level BPE.

    Attributes:
        split: A regular expression whose matches are the words, or None for GPT-2's own rule.
        single_digits: Cut every digit off first.
        nfc: Normalise to Unicode NFC first.
        ignore_merges: A word that is in the vocabulary is one token, whatever the merges say.
        add_bos: Prepend BOS where the file does not say whether to.
    """

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = PreTokenizer(_LLAMA3_SPLIT, ignore_merges=True, add_bos=True)

#: By the value of ``tokenizer.ggml.pre``.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": PreTokenizer(_TEKKEN_SPLIT, ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer(_QWEN2_SPLIT, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2_SPLIT, nfc=True, add_bos=True),
}


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer of a GGUF file, ready to be saved as tokenizer.json.

    Raises:
        ModelError: Its kind or its pre-tokenizer is not supported, or its vocabulary is broken.
    """
    metadata = file.metadata
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    vocab = {token: index for index, token in enumerate(tokens)}
    if not tokens or len(vocab) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{file.path} has no vocabulary, or one with duplicates.", param="model")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(file, vocab)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(file, vocab), True
    else:
        raise ModelError(f"{file.path} has a tokenizer of kind {kind!r}; supported are gpt2 and llama.", param="model")
    _add_special_tokens(tokenizer, metadata)
    first = special_token(file, "bos") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    last = special_token(file, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if first or last:
        tokenizer.post_processor = _surround(tokenizer, first, last)
    return tokenizer


def hf_tokenizer_config(file: GGUFFile, max_length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json: special tokens and chat template.

    The class is the generic one, which takes tokenizer.json as it is; the models' own rebuild parts of it.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    for field, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := special_token(file, name)) is not None:
            config[f"{field}_token"] = token
    if "tokenizer.chat_template" in file.metadata:
        config["chat_template"] = file.metadata["tokenizer.chat_template"]
    return config


def special_token(file: GGUFFile, name: str) -> str | None:
    """The text of the token that has a role (``bos``, ``eos``, ``unknown``, ``padding``), or None.

    Raises:
        ModelError: Its id is not in the vocabulary.
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ModelError(f"{file.path}: the {name} token {token_id!r} is not in the vocabulary.", param="model")
    return str(tokens[token_id])


def merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """BPE merges that reproduce a SentencePiece vocabulary, which has a score per token instead.

    Every way to cut a token into two tokens is a merge. Order: best score, then longest left part, then
    longest right part, as ``generate_merges`` in transformers has it.
    """
    found = [
        (-scores[index], -cut, cut - len(token), token)
        for token, index in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    found.sort(key=lambda merge: merge[:3])
    return [(token[:-minus_cut], token[-minus_cut:]) for _, minus_cut, _, token in found]


def _byte_level(file: GGUFFile, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether it prepends BOS by default."""
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    rules = PRE_TOKENIZERS.get(name)
    if rules is None:
        raise ModelError(
            f"{file.path} uses pre-tokenizer {name!r}; supported are {', '.join(PRE_TOKENIZERS)}.",
            param="model",
        )
    merges = [tuple(merge.split(" ")) for merge in file.metadata.get("tokenizer.ggml.merges", [])]
    if not all(len(merge) == 2 and {*merge, "".join(merge)} <= vocab.keys() for merge in merges):
        raise ModelError(f"{file.path} has merges that are not in its vocabulary.", param="model")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rules.ignore_merges))
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rules.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rules.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rules.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rules.add_bos


def _sentencepiece(file: GGUFFile, vocab: dict[str, int]) -> Tokenizer:
    scores = file.metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(vocab):
        raise ModelError(f"{file.path} does not have a score for each of its tokens.", param="model")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_from_scores(vocab, scores),
            unk_token=special_token(file, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    add_prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, metadata: Metadata) -> None:
    """Tokens that are matched in the text as they stand: control tokens (special) and user-defined ones."""
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=False):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _surround(tokenizer: Tokenizer, first: str | None, last: str | None) -> processors.TemplateProcessing:
    """Put BOS before and EOS after every encoded text."""
    before, after = ([token] if token else [] for token in (first, last))
    marks = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[
            *before,
            "$A",
            *after,
            *(f"{token}:1" for token in before),
            "$B:1",
            *(f"{token}:1" for token in after),
        ],
        special_tokens=marks,
    )
