"""Tiny random checkpoints of every supported architecture, made and saved by transformers itself.

``tiny_checkpoint(name)`` gives a folder that is made once per process and removed at its end; copy it before
you change anything in it. ``NAMES`` lists the variants.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 512
MAX_POSITIONS = 512

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": MAX_POSITIONS // 4,
}

#: Name -> (transformers config class, what differs from ``_SHAPE``).
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": _YARN_ROPE}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("MistralConfig", {"sliding_window": 20}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "num_key_value_heads": 4}),
    "qwen3-bias": ("Qwen3Config", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
}

NAMES = tuple(_VARIANTS)

#: One variant of each architecture, for tests that are too slow to run on all.
ARCHITECTURE_NAMES = ("llama", "mistral-window", "qwen2", "qwen3")


def make_tiny_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """The reference model itself, fp32 on the CPU, with random norms and biases too (not all 1 and 0)."""
    config_class, overrides = _VARIANTS[name]
    config = getattr(transformers, config_class)(**{**_SHAPE, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    reference: transformers.PreTrainedModel = model.requires_grad_(False)
    return reference


def save_tiny_model(name: str, folder: Path, seed: int = 0, **save_options: Any) -> Path:
    """Write a variant's checkpoint (config.json, generation_config.json, model.safetensors) to ``folder``."""
    make_tiny_model(name, seed).save_pretrained(folder, **save_options)
    return folder


@functools.cache
def tiny_checkpoint(name: str) -> Path:
    """Folder with the variant's checkpoint; read-only for callers."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save_tiny_model(name, folder)


@functools.cache
def reference_model(name: str) -> transformers.PreTrainedModel:
    """The variant as transformers loads it back from its checkpoint, eager attention, fp32."""
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tiny_checkpoint(name), attn_implementation="eager", dtype=torch.float32)
    reference: transformers.PreTrainedModel = model.eval().requires_grad_(False)
    return reference
