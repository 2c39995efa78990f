"""What a checkpoint folder says about its model, read from config.json into one frozen dataclass.

Knows the Hugging Face configuration keys of the supported architectures, with the defaults that
``transformers`` gives them, in both its older spelling (``rope_theta``, ``rope_scaling``, ``torch_dtype``)
and that of version 5 (``rope_parameters``, ``dtype``). Knows nothing about tensors: imports neither torch nor
transformers. A key that changes the result and is not supported is an error that names it; a key it does not
know is logged.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from workers.errors import ModelError
from workers.model.rope_config import RopeConfig, parse_rope

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES: dict[str, Dtype] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}

_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL_DEFAULTS = _LLAMA_DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
_QWEN2_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Architecture:
    """How one architecture differs from the others.

    Attributes:
        model_type: Its ``model_type`` in config.json.
        defaults: Value of every key that config.json may leave out.
        bias_keys: Which of ``attention_bias`` and ``mlp_bias`` the architecture obeys.
        qkv_bias: Whether q, k and v always have a bias.
        qk_norm: Whether q and k are normalised per head.
        window_keys: Whether a sliding window needs ``use_sliding_window`` and covers only some layers.
    """

    model_type: str
    defaults: Mapping[str, Any]
    bias_keys: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    window_keys: bool = False


_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture("llama", _LLAMA_DEFAULTS, bias_keys=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": _Architecture("mistral", _MISTRAL_DEFAULTS),
    "Qwen2ForCausalLM": _Architecture("qwen2", _QWEN2_DEFAULTS, qkv_bias=True, window_keys=True),
    "Qwen3ForCausalLM": _Architecture(
        "qwen3",
        _QWEN2_DEFAULTS | {"head_dim": 128},
        bias_keys=("attention_bias",),
        qk_norm=True,
        window_keys=True,
    ),
}

#: Keys that change the result in some model family, with the values under which they change nothing here.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "is_encoder_decoder": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "no_rope_layers": (None,),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0),
}

#: Keys that say nothing about the arithmetic of inference.
_INERT = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "cache_implementation",
        "chunk_size_feed_forward",
        "hidden_dropout_prob",
        "id2label",
        "is_llama_config",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)
_CONSUMED = frozenset(
    {
        "dtype",
        "torch_dtype",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and arithmetic of a decoder; everything that its code is generated from.

    Attributes:
        architecture: Name of the Hugging Face class, for example ``LlamaForCausalLM``.
        model_type: ``llama``, ``mistral``, ``qwen2`` or ``qwen3``.
        num_key_value_heads: Divides ``num_attention_heads`` (grouped-query attention).
        head_dim: Size of one head; ``num_attention_heads * head_dim`` need not be ``hidden_size``.
        max_position_embeddings: Longest context the model was made for, in tokens.
        rope: Rotary embedding, resolved.
        qkv_bias: Whether the q, k and v projections have a bias; ``o_bias`` and ``mlp_bias`` likewise.
        qk_norm: Whether q and k are RMS-normalised per head before the rotation.
        sliding_window: Keys a query sees, its own included, in every layer; None for all of them.
        initializer_range: Standard deviation of initial weights, used for dummy ones.
        bos_token_id: Beginning of sequence, or None.
        eos_token_ids: End of sequence: those of config.json, then those of generation_config.json.
        dtype: As the checkpoint was saved.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: Dtype = "float32"

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Read ``path/config.json``, and ``path/generation_config.json`` where there is one.

        Raises:
            ModelError: No such file, an unsupported architecture or feature, or a value that makes no sense.
        """
        folder = Path(path)
        raw = _read_json(folder / "config.json")
        name, architecture = _find_architecture(raw)
        _refuse_unsupported(raw, architecture)
        values = {**architecture.defaults, **raw}
        num_heads = _int(values, "num_attention_heads")
        hidden_size = _int(values, "hidden_size")
        max_position_embeddings = _int(values, "max_position_embeddings")
        attention_bias = "attention_bias" in architecture.bias_keys and _flag(values, "attention_bias")
        config = cls(
            architecture=name,
            model_type=architecture.model_type,
            vocab_size=_int(values, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_int(values, "intermediate_size"),
            num_hidden_layers=_int(values, "num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=_int(values, "num_key_value_heads", if_null=num_heads),
            head_dim=_int(values, "head_dim", if_null=hidden_size // num_heads),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=_float(values, "rms_norm_eps"),
            rope=parse_rope(raw, max_position_embeddings),
            tie_word_embeddings=_flag(values, "tie_word_embeddings"),
            qkv_bias=architecture.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias="mlp_bias" in architecture.bias_keys and _flag(values, "mlp_bias"),
            qk_norm=architecture.qk_norm,
            sliding_window=_sliding_window(values, architecture),
            initializer_range=_float(values, "initializer_range"),
            bos_token_id=_token_ids(values, "bos_token_id")[0] if values["bos_token_id"] is not None else None,
            eos_token_ids=_eos_token_ids(folder, values),
            dtype=_dtype(folder, values),
        )
        config._check_heads()
        return config

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise _wrong(
                "num_key_value_heads",
                f"must divide num_attention_heads ({self.num_attention_heads})",
                self.num_key_value_heads,
            )
        if self.head_dim % 2:
            raise _wrong("head_dim", "must be even, because rotary embedding turns pairs", self.head_dim)


def _wrong(key: str, rule: str, value: object) -> ModelError:
    return ModelError(f"config.json: {key} {rule} (it is {value!r}).", param=key)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}; give a Hugging Face checkpoint folder.", param="model"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}.", param="model") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(content).__name__}.", param="model")
    return content


def _find_architecture(raw: Mapping[str, Any]) -> tuple[str, _Architecture]:
    """The architecture named first; a config that names none is looked up by ``model_type``."""
    named = raw.get("architectures") or [
        name for name, known in _ARCHITECTURES.items() if known.model_type == raw.get("model_type")
    ]
    first = named[0] if isinstance(named, list) and named else None
    if first not in _ARCHITECTURES:
        what = repr(first) if first else f"no architecture and model_type {raw.get('model_type')!r}"
        raise ModelError(
            f"config.json names {what}; supported architectures are {', '.join(_ARCHITECTURES)}.",
            param="architectures",
        )
    return first, _ARCHITECTURES[first]


def _refuse_unsupported(raw: Mapping[str, Any], architecture: _Architecture) -> None:
    for key, allowed in _MUST_BE.items():
        if key in raw and raw[key] not in allowed:
            raise _wrong(key, "is not supported", raw[key])
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key) and key not in architecture.bias_keys:
            raise _wrong(key, f"is not a feature of {architecture.model_type}", raw[key])
    known = _INERT | _CONSUMED | _MUST_BE.keys() | architecture.defaults.keys()
    unknown = sorted(key for key in raw if key not in known and raw[key] is not None)
    if unknown:
        logger.warning("config.json: no meaning here, and so without effect: %s", ", ".join(unknown))


def _int(values: Mapping[str, Any], key: str, *, if_null: int | None = None, minimum: int = 1) -> int:
    value = values[key] if values[key] is not None else if_null
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise _wrong(key, f"must be a whole number, {minimum} or more", values[key])
    return value


def _float(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _wrong(key, "must be a number above 0", value)
    return float(value)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values[key]
    if not isinstance(value, bool):
        raise _wrong(key, "must be true or false", value)
    return value


def _sliding_window(values: Mapping[str, Any], architecture: _Architecture) -> int | None:
    """One window for the whole model; a window in only some of the layers is refused."""
    window = values.get("sliding_window") if "sliding_window" in architecture.defaults else None
    if architecture.window_keys and not _flag(values, "use_sliding_window"):
        window = None
    if window is not None:
        window = _int(values, "sliding_window")
    num_layers = _int(values, "num_hidden_layers")
    num_full = num_layers if window is None else 0
    key = "layer_types"
    if values.get("layer_types") is not None:
        num_full = _count_full_attention(values["layer_types"], num_layers, window)
    elif window is not None and architecture.window_keys:
        key = "max_window_layers"
        num_full = min(_int(values, key, minimum=0), num_layers)
    if 0 < num_full < num_layers:
        rule = "mixes full and sliding-window attention, which is not supported"
        raise _wrong(key, rule, values[key])
    return window if num_full == 0 else None


def _count_full_attention(layer_types: Any, num_layers: int, window: int | None) -> int:
    """Number of full-attention layers in an explicit ``layer_types``."""
    allowed = {"full_attention"} if window is None else {"full_attention", "sliding_attention"}
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or not allowed.issuperset(layer_types):
        rule = f"must list {num_layers} times one of {', '.join(sorted(allowed))}"
        raise _wrong("layer_types", rule, layer_types)
    return layer_types.count("full_attention")


def _token_ids(values: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A token id, a list of them, or null."""
    value = values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise _wrong(key, "must be a token id or a list of them", value)
    return tuple(ids)


def _eos_token_ids(folder: Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    ids = _token_ids(values, "eos_token_id")
    path = folder / "generation_config.json"
    if path.exists():
        ids += _token_ids(_read_json(path), "eos_token_id")
    # Some checkpoints write -1 for "none"; nothing negative can be sampled.
    return tuple(dict.fromkeys(token for token in ids if token >= 0))


def _dtype(folder: Path, values: Mapping[str, Any]) -> Dtype:
    """The dtype config.json names, else that of the stored weights, else fp32 (no weights: a dummy model)."""
    key = "dtype" if values.get("dtype") is not None else "torch_dtype"
    name = values.get(key)
    if name is None:
        return _stored_dtype(folder) or "float32"
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise _wrong(key, "must be float32, bfloat16 or float16", name)
    return dtype


def _stored_dtype(folder: Path) -> Dtype | None:
    """Dtype of the first floating-point tensor of the folder's first safetensors file.

    The format (https://huggingface.co/docs/safetensors) starts with the length of a JSON header.
    """
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(min(length, path.stat().st_size)))
            except ValueError as error:
                raise ModelError(f"{path} is not a safetensors file; copy it again.", param="model") from error
        stored = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
        return next((_DTYPES[dtype] for dtype in stored if dtype in _DTYPES), None)
    return None
