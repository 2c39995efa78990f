"""An engine's bundle: its key from the configuration, and the library that it is looked for in.

Knows which setting stands for what once device, dtype and backend are settled; nothing of what a bundle holds.
"""

from __future__ import annotations

import dataclasses

import torch

from workers.artifacts.factors import Section, config_sections
from workers.artifacts.key import BundleKey
from workers.attention.base import AttentionBackend
from workers.attention.selector import make_backend
from workers.checkpoint.resolve import resolve_model
from workers.compile.decorator import dynamic_arg_dims
from workers.compile.key import bundle_key
from workers.config import EngineConfig
from workers.model.config import ModelConfig
from workers.model.decoder import DecoderForCausalLM, attention_spec
from workers.runner.device import resolve_device, resolve_dtype, resolve_max_model_len

#: Fields of ModelConfig that no compiled code depends on; the dtype is the engine's, not the checkpoint's.
_NOT_COMPILED = frozenset({"initializer_range", "bos_token_id", "eos_token_ids", "dtype"})


def compiles_pieces(config: EngineConfig) -> bool:
    """Whether an engine with this configuration has a bundle at all, on this machine."""
    return config.compiles_pieces(resolve_device(config.device).type)


def engine_key(
    config: EngineConfig,
    model_config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    backend: AttentionBackend,
) -> BundleKey:
    """The key of an engine's bundle; needs no module and no compiler.

    Args:
        dtype: What ``config.dtype`` stands for, and so on.
    """
    shape = dataclasses.asdict(model_config)
    resolved = {
        "model": {name: value for name, value in shape.items() if name not in _NOT_COMPILED},
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "max_model_len": max_model_len,
        "block_size": config.block_size,
        # Part of the environment where it matters, and there as it is and not as it was asked for.
        "num_threads": torch.get_num_threads() if device.type == "cpu" else None,
        "attention_backend": backend.name,
    }
    sections = config_sections(config, resolved)
    return bundle_key(
        config.compilation_config,
        device,
        dynamic_arg_dims(DecoderForCausalLM),
        splitting_ops=backend.splitting_ops,
        graph=sections[Section.GRAPH],
        capture=sections[Section.CAPTURE],
        runtime=sections[Section.RUNTIME],
    )


def key_of_config(config: EngineConfig, device: torch.device | None = None) -> BundleKey:
    """The key of the bundle that an engine with this configuration would look for on this machine.

    Args:
        device: Instead of the configured one.

    Raises:
        ModelError: The model cannot be found or is not supported.
        ConfigError: The configuration does not fit the model or this machine.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    model_config = ModelConfig.from_folder(resolve_model(config.model))
    device = device or resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, model_config, device)
    backend = make_backend(config.attention_backend, attention_spec(model_config, dtype, config.block_size), device)
    return engine_key(
        config,
        model_config,
        dtype=dtype,
        device=device,
        max_model_len=resolve_max_model_len(config.max_model_len, model_config),
        backend=backend,
    )
