"""The rotary embedding's parameters, from any spelling that config.json has for them.

Knows ``rope_theta`` + ``rope_scaling`` (older checkpoints) and ``rope_parameters`` (transformers 5), and
which keys each ``rope_type`` takes. Resolves every default, so that ``workers.model.rope`` is left with
arithmetic only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from workers.errors import ModelError

_DEFAULT_THETA = 10_000.0

#: Keys of each supported type, beside those that every type may carry.
_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
}
_COMMON_KEYS = frozenset(
    {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"}
)


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding, with every default resolved; fields that a type does not use keep neutral values.

    Attributes:
        rope_type: ``default``, ``linear``, ``llama3`` or ``yarn``.
        theta: Base of the geometric series of frequencies.
        factor: How many times longer the context is than in pretraining.
        original_max_position_embeddings: Context of the pretraining, in tokens (``llama3``, ``yarn``).
        low_freq_factor: Wavelengths above original context / this are stretched by ``factor`` (``llama3``).
        high_freq_factor: Wavelengths below original context / this are left alone (``llama3``).
        attention_factor: Multiplies cos and sin (``yarn``).
        beta_fast: Rotations over the original context above which a dimension is left alone (``yarn``).
        beta_slow: Rotations below which a dimension is stretched by ``factor`` (``yarn``).
        truncate: Whether the bounds of that ramp are rounded to whole dimensions (``yarn``).
    """

    rope_type: str = "default"
    theta: float = _DEFAULT_THETA
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def parse_rope(raw: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """Resolve the rotary embedding of a config.json.

    Raises:
        ModelError: An unsupported type, a key the type does not take, or one that is missing.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(key) or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json: {key} must be an object (it is {given!r}).", param=key)
    values = {name: value for name, value in given.items() if value is not None}
    rope_type = values.get("rope_type", values.get("type", "default"))
    _check_keys(key, rope_type, values)
    theta = _number(key, {"rope_theta": raw.get("rope_theta") or _DEFAULT_THETA} | values, "rope_theta")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    original = raw.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    common = RopeConfig(rope_type, theta, original_max_position_embeddings=int(original or max_position_embeddings))
    if rope_type == "yarn":
        return _yarn(key, common, values, max_position_embeddings)
    common = dataclasses.replace(common, factor=_number(key, values, "factor"))
    if rope_type == "linear":
        return common
    low, high = _number(key, values, "low_freq_factor"), _number(key, values, "high_freq_factor")
    if high <= low:
        raise ModelError(
            f"config.json: {key} needs a high_freq_factor ({high}) above its low_freq_factor ({low}).",
            param=key,
        )
    return dataclasses.replace(common, low_freq_factor=low, high_freq_factor=high)


def _check_keys(key: str, rope_type: object, values: Mapping[str, Any]) -> None:
    if rope_type not in _KEYS:
        raise ModelError(
            f"config.json: {key} has rope_type {rope_type!r}; supported are {', '.join(_KEYS)}.", param=key
        )
    unknown = values.keys() - _COMMON_KEYS - _KEYS[str(rope_type)]
    if unknown:
        raise ModelError(
            f"config.json: {key} has {', '.join(sorted(unknown))}, unknown to rope_type {rope_type!r};"
            " remove it if it means nothing.",
            param=key,
        )
    if values.get("partial_rotary_factor", 1) != 1:
        raise ModelError(
            f"config.json: {key} has partial_rotary_factor {values['partial_rotary_factor']!r}; only 1 is supported.",
            param=key,
        )


def _number(key: str, values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {key} needs {name}, a number above 0 (it is {value!r}).", param=key)
    return float(value)


def _yarn(key: str, common: RopeConfig, values: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """YaRN (Peng et al., 2023); the defaults are those of the paper."""
    implied = max_position_embeddings / common.original_max_position_embeddings
    factor = _number(key, {"factor": implied} | dict(values), "factor")
    mscale, mscale_all_dim = values.get("mscale"), values.get("mscale_all_dim")
    if "attention_factor" in values:
        attention_factor = _number(key, values, "attention_factor")
    elif mscale and mscale_all_dim:
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    else:
        attention_factor = _mscale(factor, 1.0)
    return dataclasses.replace(
        common,
        factor=factor,
        attention_factor=attention_factor,
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        truncate=bool(values.get("truncate", True)),
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
