"""Which Hugging Face tensor each GGUF tensor becomes, and in which order its rows go.

Knows names, shapes and llama.cpp's row permutation; reads no values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from workers.checkpoint.gguf_config import Architecture
from workers.checkpoint.gguf_file import GGUFFile, TensorInfo
from workers.errors import ModelError

#: RoPE frequency factors: they become ``rope_scaling`` in config.json.
_IN_CONFIG = frozenset({"rope_freqs.weight"})


@dataclasses.dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor to convert.

    Attributes:
        name: In the Hugging Face checkpoint.
        source: In the GGUF file; same shape.
        order: For each row of the result the stored row it comes from, shape [rows], or None.
    """

    name: str
    source: TensorInfo
    order: npt.NDArray[np.intp] | None


def plan_tensors(file: GGUFFile, arch: Architecture, config: dict[str, Any]) -> list[TensorPlan]:
    """Every tensor of the checkpoint, in the model's order.

    Raises:
        ModelError: A tensor is missing, unknown, or not of the shape that the config says.
    """
    shapes = _expected_shapes(arch, config)
    unknown = sorted(file.tensors.keys() - shapes.keys() - _IN_CONFIG)
    missing = sorted(shapes.keys() - file.tensors.keys())
    for what, names in (("lacks", missing), ("holds unexpected", unknown)):
        if names:
            raise ModelError(f"{file.path} {what} tensor {names[0]} ({len(names)} in all).", param="model")
    plans = []
    for gguf_name, (name, shape) in shapes.items():
        source = file.tensors[gguf_name]
        if source.shape != shape:
            raise ModelError(
                f"{file.path}: tensor {gguf_name} has shape {source.shape} where {shape} is needed.",
                param="model",
            )
        plans.append(TensorPlan(name, source, _row_order(gguf_name, arch, config)))
    return plans


def unpermuted_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Stored row of each row, shape [num_heads * head_dim], undoing llama.cpp's permutation of Q and K.

    llama.cpp rotates neighbouring pairs of a head where transformers rotates its two halves, so its converter
    interleaves the halves (``LlamaModel.permute`` in convert_hf_to_gguf.py).
    """
    stored = np.arange(num_heads * head_dim, dtype=np.intp).reshape(num_heads, head_dim // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)


def _row_order(gguf_name: str, arch: Architecture, config: dict[str, Any]) -> npt.NDArray[np.intp] | None:
    if not arch.permuted_qk or not gguf_name.endswith((".attn_q.weight", ".attn_k.weight")):
        return None
    is_query = gguf_name.endswith(".attn_q.weight")
    num_heads = config["num_attention_heads" if is_query else "num_key_value_heads"]
    return unpermuted_rows(num_heads, config["head_dim"])


def _expected_shapes(arch: Architecture, config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (Hugging Face name, shape)."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden))
    }
    layer = _layer_shapes(arch, config)
    for index in range(config["num_hidden_layers"]):
        for gguf_name, (name, shape) in layer.items():
            shapes[f"blk.{index}.{gguf_name}"] = (f"model.layers.{index}.{name}", shape)
    shapes["output_norm.weight"] = ("model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = ("lm_head.weight", (vocab, hidden))
    return shapes


def _layer_shapes(arch: Architecture, config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key_value = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm.weight": ("input_layernorm.weight", (hidden,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (query, hidden)),
        "attn_k.weight": ("self_attn.k_proj.weight", (key_value, hidden)),
        "attn_v.weight": ("self_attn.v_proj.weight", (key_value, hidden)),
        "attn_output.weight": ("self_attn.o_proj.weight", (hidden, query)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (hidden,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (inner, hidden)),
        "ffn_up.weight": ("mlp.up_proj.weight", (inner, hidden)),
        "ffn_down.weight": ("mlp.down_proj.weight", (hidden, inner)),
    }
    if arch.qkv_bias:
        shapes["attn_q.bias"] = ("self_attn.q_proj.bias", (query,))
        shapes["attn_k.bias"] = ("self_attn.k_proj.bias", (key_value,))
        shapes["attn_v.bias"] = ("self_attn.v_proj.bias", (key_value,))
    if arch.qk_norm:
        shapes["attn_q_norm.weight"] = ("self_attn.q_norm.weight", (head_dim,))
        shapes["attn_k_norm.weight"] = ("self_attn.k_norm.weight", (head_dim,))
    return shapes
