"""From GGUF metadata to config.json, and which tensor goes where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from tests.model_fixtures import (
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    byte_level_vocabulary,
    tiny_metadata,
    tiny_tensors,
    write_gguf,
    write_tiny_gguf,
)
from workers.checkpoint.convert import convert_gguf
from workers.checkpoint.gguf_config import hf_config, hf_generation_config, llama3_frequency_factors
from workers.checkpoint.gguf_file import GGUFFile
from workers.checkpoint.gguf_tensors import unpermuted_rows
from workers.errors import ModelError


def _config(path: Path, arch: str = "llama", **changes: Any) -> dict[str, Any]:
    with GGUFFile(write_tiny_gguf(path / "m.gguf", arch, **changes)) as file:
        return hf_config(file)


def test_llama_config(tmp_path: Path) -> None:
    assert _config(tmp_path, tokenizer__ggml__padding_token_id=2) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(byte_level_vocabulary()[0]),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


@pytest.mark.parametrize(
    ("arch", "class_name"),
    [("mistral", "MistralForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")],
)
def test_other_architectures(tmp_path: Path, arch: str, class_name: str) -> None:
    config = _config(tmp_path, arch)
    assert (config["model_type"], config["architectures"]) == (arch, [class_name])
    assert config.get("sliding_window", None) is None


def test_head_size_comes_from_key_length_before_rope_before_hidden_size(tmp_path: Path) -> None:
    assert _config(tmp_path, llama__rope__dimension_count=8)["head_dim"] == 8
    both = _config(tmp_path, llama__rope__dimension_count=32, llama__attention__key_length=32)
    assert both["head_dim"] == 32


def test_an_end_of_turn_token_ends_generation(tmp_path: Path) -> None:
    with GGUFFile(write_tiny_gguf(tmp_path / "m.gguf", tokenizer__ggml__eot_token_id=3)) as file:
        assert hf_generation_config(file)["eos_token_id"] == [2, 3]
    with GGUFFile(write_tiny_gguf(tmp_path / "n.gguf", tokenizer__ggml__eot_token_id=2)) as file:
        assert hf_generation_config(file)["eos_token_id"] == 2


def test_linear_rope_scaling(tmp_path: Path) -> None:
    config = _config(tmp_path, llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def _write_with_factors(path: Path, factors: np.ndarray) -> Path:
    tensors = {**tiny_tensors(), "rope_freqs.weight": (factors, GGMLQuantizationType.F32)}
    return write_gguf(path, tiny_metadata(), tensors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered_from_the_factors(tmp_path: Path, factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    stored = llama3_frequency_factors(scaling, 500000.0, HIDDEN // HEADS // 2).astype(np.float32)
    path = _write_with_factors(tmp_path / "m.gguf", stored)
    with GGUFFile(path) as file:
        assert hf_config(file)["rope_scaling"] == scaling
    (tmp_path / "out").mkdir()
    convert_gguf(path, tmp_path / "out")  # the factors are no tensor of the checkpoint


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    path = _write_with_factors(tmp_path / "m.gguf", np.linspace(1, 3, HIDDEN // HEADS // 2))
    with GGUFFile(path) as file, pytest.raises(ModelError, match="RoPE frequency factors"):
        hf_config(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama__expert_count": 8}, "llama with experts; supported are llama, mistral, qwen2, qwen3"),
        ({"llama__block_count": None}, "llama.block_count is None where one positive int"),
        ({"llama__embedding_length": "64"}, "embedding_length is '64'"),
        ({"llama__attention__head_count": 0}, "head_count is 0"),
        ({"llama__attention__head_count_kv": [2, 4]}, r"head_count_kv is \[2, 4\]"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "rms_epsilon is nan"),
        ({"llama__rope__scaling__type": "yarn"}, "'yarn'; supported are linear and llama3"),
        ({"llama__attention__value_length": 32}, "attention.value_length differs from the head size"),
        ({"llama__attention__key_length": 16, "llama__rope__dimension_count": 8}, "rope.dimension_count differs"),
    ],
)
def test_unsupported_headers_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        _config(tmp_path, **changes)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="architecture bloom; supported are llama"):
        _config(tmp_path, "bloom")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"lacks tensor blk\.1\.ffn_up\.weight \(1 in all\)"),
        ({"blk.0.attn_q.bias": np.zeros(HIDDEN)}, r"holds unexpected tensor blk\.0\.attn_q\.bias"),
        ({"output_norm.weight": np.zeros(HIDDEN + 1)}, r"has shape \(65,\) where \(64,\) is needed"),
        ({"token_embd.weight": np.zeros((7, HIDDEN))}, r"token_embd\.weight has shape \(7, 64\)"),
    ],
)
def test_tensors_must_be_those_of_the_config(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    tensors = tiny_tensors()
    for name, data in change.items():
        tensors.pop(name, None)
        if data is not None:
            tensors[name] = (data, GGMLQuantizationType.F32)
    path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), tensors)
    with pytest.raises(ModelError, match=message):
        convert_gguf(path, tmp_path)


def test_llama_cpp_permutation_is_undone() -> None:
    num_heads, head_dim, width = 3, 8, 5
    weights = np.random.default_rng(0).normal(size=(num_heads * head_dim, width))
    # LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py
    stored = weights.reshape(num_heads, 2, head_dim // 2, width).swapaxes(1, 2).reshape(weights.shape)
    assert not np.array_equal(stored, weights)
    np.testing.assert_array_equal(stored[unpermuted_rows(num_heads, head_dim)], weights)


def test_progress_and_files(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    out = tmp_path / "out"
    out.mkdir()
    seen: list[tuple[int, int]] = []
    convert_gguf(path, out, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
