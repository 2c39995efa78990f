"""Turns a GGUF header into the fields of a Hugging Face ``config.json``.

Covers the architectures whose decoder the engine has: Llama (under which llama.cpp also files Mistral), Qwen2
and Qwen3. Knows metadata keys; of the tensors it looks at which there are, and at RoPE frequency factors.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from workers.checkpoint.gguf_file import GGUFFile, Metadata
from workers.errors import ModelError

_DEFAULT_ROPE_THETA = 10000.0  # llama.cpp's, where a file does not say

_Number = TypeVar("_Number", int, float)


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """How one GGUF architecture maps to a ``transformers`` one.

    Attributes:
        model_type: ``model_type`` in config.json.
        class_name: ``architectures`` in config.json.
        permuted_qk: llama.cpp stores Q and K rows in its own RoPE order, which the import must undo.
        qkv_bias: Q, K and V have a bias.
        qk_norm: Q and K are normalised per head.
    """

    model_type: str
    class_name: str
    permuted_qk: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted_qk=True),
    "mistral": Architecture("mistral", "MistralForCausalLM", permuted_qk=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", qk_norm=True),
}


def find_architecture(file: GGUFFile) -> Architecture:
    """The entry of ``ARCHITECTURES`` for this file.

    Raises:
        ModelError: The architecture is not supported.
    """
    name = file.metadata.get("general.architecture")
    found = ARCHITECTURES.get(str(name))
    if found is None or file.metadata.get(f"{name}.expert_count"):
        described = f"{name} with experts" if found else name
        raise ModelError(
            f"{file.path} is a model of architecture {described}; supported are {', '.join(ARCHITECTURES)}.",
            param="model",
        )
    return found


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The content of config.json, for bfloat16 weights.

    Raises:
        ModelError: The architecture or its RoPE scaling is not supported, or a key is missing.
    """
    arch = find_architecture(file)
    keys = _Keys(file)
    num_heads = keys.number("attention.head_count", int)
    hidden_size = keys.number("embedding_length", int)
    head_dim = keys.number("rope.dimension_count", int, hidden_size // max(num_heads, 1))
    rope_theta = keys.number("rope.freq_base", float, _DEFAULT_ROPE_THETA)
    config = {
        "architectures": [arch.class_name],
        "model_type": arch.model_type,
        "vocab_size": len(file.metadata.get("tokenizer.ggml.tokens", ())),
        "hidden_size": hidden_size,
        "intermediate_size": keys.number("feed_forward_length", int),
        "num_hidden_layers": keys.number("block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", int, num_heads),
        "head_dim": keys.number("attention.key_length", int, head_dim),
        "hidden_act": "silu",
        "max_position_embeddings": keys.number("context_length", int),
        "rms_norm_eps": _shortest(keys.number("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(rope_theta),
        "rope_scaling": _rope_scaling(keys, rope_theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_dropout": 0.0,
        "torch_dtype": "bfloat16",
        **_token_ids(file.metadata),
    }
    if arch.model_type == "mistral":
        config["sliding_window"] = None  # transformers' default is 4096
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.number(key, int, config["head_dim"]) != config["head_dim"]:
            raise ModelError(f"{file.path}: {key} differs from the head size, which is not supported.", param="model")
    return config


def hf_generation_config(file: GGUFFile) -> dict[str, Any]:
    """The content of generation_config.json; a model's end-of-turn token ends a generation, as EOS does."""
    ids = _token_ids(file.metadata)
    end_of_turn = file.metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and end_of_turn != ids["eos_token_id"]:
        ids["eos_token_id"] = [id_ for id_ in (ids["eos_token_id"], end_of_turn) if id_ is not None]
    return ids


def _token_ids(metadata: Metadata) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {field: metadata.get(f"tokenizer.ggml.{name}_token_id") for field, name in names.items()}


class _Keys:
    """Metadata under the architecture's prefix, checked for type: what a file says is not to be trusted."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._prefix = file.metadata["general.architecture"]

    def number(self, key: str, kind: type[_Number], default: _Number | None = None) -> _Number:
        """One positive number; a list means that layers differ, which no supported decoder has."""
        value = self.file.metadata.get(f"{self._prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            raise ModelError(
                f"{self.file.path}: metadata key {self._prefix}.{key} is {value!r} where one positive "
                f"{kind.__name__} is needed.",
                param="model",
            )
        return value

    def text(self, key: str, default: str) -> str:
        return str(self.file.metadata.get(f"{self._prefix}.{key}", default))


def _shortest(value: float) -> float:
    """The number with the fewest digits that is this float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(keys: _Keys, theta: float) -> dict[str, Any] | None:
    path, tensors = keys.file.path, keys.file.tensors
    kind = keys.text("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor", float)}
    if kind != "none":
        raise ModelError(f"{path} uses RoPE scaling {kind!r}; supported are linear and llama3.", param="model")
    if "rope_freqs.weight" not in tensors:
        return None
    stored = keys.file.values(tensors["rope_freqs.weight"])
    scaling = {
        "rope_type": "llama3",
        "factor": _shortest(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(stored, llama3_frequency_factors(scaling, theta, stored.size), rtol=1e-4):
        raise ModelError(
            f"{path} has RoPE frequency factors other than Llama 3's, which is not supported.", param="model"
        )
    return scaling


def llama3_frequency_factors(scaling: dict[str, Any], theta: float, num_freqs: int) -> npt.NDArray[np.float64]:
    """What each rotary frequency is divided by, shape [num_freqs], under Llama 3's scaling.

    GGUF stores these divisors and not the four parameters. Meta has used one set of parameters but for
    ``factor``, which is the largest divisor. Formula: ``_compute_llama3_parameters`` in transformers'
    modeling_rope_utils.py.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    old_context = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi * theta ** (np.arange(num_freqs) / num_freqs)
    smooth = np.clip((old_context / wavelengths - low) / (high - low), 0.0, 1.0)
    factors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors
