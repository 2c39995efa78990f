"""Which device, dtype and context length an engine uses."""

from __future__ import annotations

import torch

from workers.errors import ConfigError
from workers.model.config import ModelConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: The name is not a device, or that device is not here.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name!r} is not a device; use auto, cpu, cuda or cuda:N.", param="device") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not supported; use auto, cpu, cuda or cuda:N.", param="device")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device={name!r}: there is no CUDA device here; use auto or cpu.", param="device")
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device={name!r}: there are {torch.cuda.device_count()} CUDA devices here.", param="device"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return device


def resolve_dtype(name: str, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    """``auto`` is the checkpoint's dtype.

    Raises:
        ConfigError: float16 on a CPU, which has no fast arithmetic for it.
    """
    dtype = _DTYPES[model_config.dtype if name == "auto" else name]
    if dtype is torch.float16 and device.type == "cpu":
        raise ConfigError("dtype float16 does not run on a CPU; use bfloat16 or float32.", param="dtype")
    return dtype


def resolve_max_model_len(max_model_len: int | None, model_config: ModelConfig) -> int:
    """None is the model's own.

    Raises:
        ConfigError: The model was not made for so many positions.
    """
    limit = model_config.max_position_embeddings
    if max_model_len is None:
        return limit
    if max_model_len > limit:
        raise ConfigError(
            f"max_model_len={max_model_len} exceeds the {limit} positions the model was made for; lower it.",
            param="max_model_len",
        )
    return max_model_len
