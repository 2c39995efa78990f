"""config.json is read as transformers reads it; what is not supported is refused by name."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny_models import NAMES, make_tiny_model, reference_model, tiny_checkpoint
from workers.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.rope import compute_inv_freq
from workers.model.rope_config import RopeConfig

#: Fields that transformers calls by the same name.
SAME_NAME = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "sliding_window",
)

MINIMAL: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 1024}


def read(folder: Path, **content: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(content))
    return ModelConfig.from_folder(folder)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_defaults_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    ours = read(tmp_path, architectures=[f"{name}ForCausalLM"])
    theirs = getattr(transformers, f"{name}Config")()
    for field in SAME_NAME:
        assert getattr(ours, field) == getattr(theirs, field, None), field
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert ours.qkv_bias == (name == "Qwen2")
    assert ours.qk_norm == (name == "Qwen3")
    assert ours.dtype == "float32"


@pytest.mark.parametrize("name", NAMES)
def test_saved_configs_are_read_back(name: str) -> None:
    ours, model = ModelConfig.from_folder(tiny_checkpoint(name)), reference_model(name)
    assert ours.architecture == type(model).__name__
    inv_freq = compute_inv_freq(ours.rope, ours.head_dim)
    torch.testing.assert_close(inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert ours.rope.attention_factor == pytest.approx(model.model.rotary_emb.attention_scaling)
    state = model.state_dict()
    assert ours.qkv_bias == ("model.layers.0.self_attn.q_proj.bias" in state)
    assert ours.o_bias == ("model.layers.0.self_attn.o_proj.bias" in state)
    assert ours.mlp_bias == ("model.layers.0.mlp.up_proj.bias" in state)
    assert ours.dtype == "float32"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_both_spellings_of_rope_give_the_frequencies_of_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    old = read(tmp_path, **MINIMAL, rope_theta=5000.0, rope_scaling={"type": rope["rope_type"], **rope})
    new = read(tmp_path, **MINIMAL, rope_parameters={"rope_theta": 5000.0, **rope})
    assert old == new
    config = transformers.LlamaConfig(
        **MINIMAL, hidden_size=256, num_attention_heads=2, rope_parameters={"rope_theta": 5000.0, **rope}
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    torch.testing.assert_close(compute_inv_freq(new.rope, 128), rotary.inv_freq, rtol=1e-6, atol=0)
    assert new.rope.attention_factor == pytest.approx(rotary.attention_scaling)


def test_null_rope_scaling_and_bare_theta(tmp_path: Path) -> None:
    assert read(tmp_path, **MINIMAL, rope_theta=100000, rope_scaling=None).rope == RopeConfig(theta=100000.0)


def test_eos_ids_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert read(tmp_path, **MINIMAL, eos_token_id=7).eos_token_ids == (7, 5)
    assert read(tmp_path, **MINIMAL, eos_token_id=None).eos_token_ids == (5, 7)


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("torch_dtype", "torch.float16")])
def test_dtype_of_either_spelling(key: str, value: str, tmp_path: Path) -> None:
    assert read(tmp_path, **MINIMAL, **{key: value}).dtype == value.removeprefix("torch.")


def test_dtype_falls_back_to_the_stored_one(tmp_path: Path) -> None:
    make_tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    assert read(tmp_path, **config).dtype == "bfloat16"


def test_model_type_stands_in_for_missing_architectures(tmp_path: Path) -> None:
    assert read(tmp_path, model_type="qwen3").architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures", "Qwen3ForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "architectures", "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act", "not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config", "not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling", "yarn"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "rope_parameters", "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters", "full_attention"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling", "factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "rope_scaling",
            "high_freq_factor",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "whole number"),
        ({"hidden_size": "64"}, "hidden_size", "whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps", "above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "true or false"),
        ({"num_key_value_heads": 5}, "num_key_value_heads", "divide"),
        ({"head_dim": 33}, "head_dim", "even"),
        ({"eos_token_id": "</s>"}, "eos_token_id", "token id"),
        ({"dtype": "float8_e4m3fn"}, "dtype", "bfloat16"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias", "mistral"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True},
            "max_window_layers",
            "mixes",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "num_hidden_layers": 2,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "layer_types",
            "mixes",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "num_hidden_layers": 1,
                "layer_types": ["sliding_attention"],
            },
            "layer_types",
            "full_attention",
        ),
    ],
)
def test_unsupported_values_are_refused_by_name(
    changes: dict[str, Any], param: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        read(tmp_path, **{**MINIMAL, **changes})
    assert caught.value.param == param
    assert param in str(caught.value) or param == "architectures"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="object"):
        ModelConfig.from_folder(tmp_path)


def test_unknown_keys_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path, **MINIMAL, residual_multiplier=2.0, use_cache=True, pad_token_id=0)
    assert "residual_multiplier" in caplog.text
    assert "use_cache" not in caplog.text


def test_reading_a_config_imports_no_torch() -> None:
    code = "import sys, workers.model.config; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
