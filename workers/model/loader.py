"""Fills a decoder with weights, from a checkpoint or at random.

Knows that everything is checked before anything is allocated, and that each byte is copied once: from the
mapped file into its place in the (fused) parameter. Knows nothing about downloads, formats other than
safetensors, or what happens to the model afterwards.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from workers.errors import ModelError
from workers.kernels.linear import Linear
from workers.model.checkpoint_reader import CheckpointReader, StoredTensor
from workers.model.config import ModelConfig
from workers.model.decoder import DecoderForCausalLM
from workers.model.layout import EMBEDDINGS, IGNORABLE_SUFFIXES, TIED_HEAD, Destination, checkpoint_layout
from workers.model.rope import compute_cos_sin_cache

logger = logging.getLogger(__name__)

#: Called with (bytes done, bytes in all) while weights are read.
Progress = Callable[[int, int], None]

_META = torch.device("meta")
_MAX_NAMES = 5


def load_model(
    folder: Path,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    *,
    max_model_len: int | None = None,
    progress: Progress | None = None,
) -> DecoderForCausalLM:
    """Build a decoder and fill it.

    Args:
        folder: The checkpoint; not looked at when ``load_format`` is ``dummy``.
        model_config: What the folder's config.json says.
        dtype: Of the model; weights stored otherwise are cast.
        device: Where the parameters are allocated, once.
        load_format: ``auto`` and ``safetensors`` stream safetensors, ``dummy`` makes random weights.
        seed: Of the dummy weights.
        max_model_len: Positions in the rotary table; None takes the model's.
        progress: Told how far reading has come.

    Raises:
        ModelError: The checkpoint lacks a tensor, has one too many, or one of the wrong shape or dtype.
    """
    started_s = time.perf_counter()
    model = DecoderForCausalLM(model_config, dtype=dtype, device=_META, max_model_len=max_model_len)
    if load_format == "dummy":
        _allocate(model, device)
        _fill_randomly(model, seed)
    else:
        _load_checkpoint(model, folder, device, progress or _no_progress)
    for module in model.modules():
        if isinstance(module, Linear):
            module.finalize()
    model.eval()
    logger.info("weights ready in %.2f s", time.perf_counter() - started_s)
    return model


def _no_progress(num_bytes_done: int, num_bytes: int) -> None:
    """Progress that nobody watches."""


def _load_checkpoint(model: DecoderForCausalLM, folder: Path, device: torch.device, progress: Progress) -> None:
    layout = checkpoint_layout(model, model.config)
    with CheckpointReader(folder) as reader:
        _check_names(reader.tensors, layout, tied=model.config.tie_word_embeddings)
        _check_tensors(reader.tensors, layout)
        _check_tied_head(reader, tied=model.config.tie_word_embeddings)
        _allocate(model, device)
        _copy_tensors(model, reader, layout, progress)


def _check_names(tensors: Iterable[str], layout: dict[str, Destination], *, tied: bool) -> None:
    """Every expected tensor is there, and nothing else that could carry meaning."""
    stored = {name for name in tensors if not name.endswith(IGNORABLE_SUFFIXES)}
    if tied:
        stored.discard(TIED_HEAD)
    missing, extra = sorted(layout.keys() - stored), sorted(stored - layout.keys())
    if missing:
        raise ModelError(f"The checkpoint lacks {_some(missing)}, which config.json calls for.", param="model")
    if extra:
        raise ModelError(f"The checkpoint has {_some(extra)}, which config.json has no use for.", param="model")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + rest


def _check_tensors(tensors: dict[str, StoredTensor], layout: dict[str, Destination]) -> None:
    for name, destination in layout.items():
        stored = tensors[name]
        if stored.shape != destination.shape:
            raise ModelError(
                f"Tensor {name} in {stored.file} has shape {list(stored.shape)}, but config.json calls for"
                f" {list(destination.shape)}.",
                param="model",
            )
        _ = stored.torch_dtype


def _check_tied_head(reader: CheckpointReader, *, tied: bool) -> None:
    """A head stored beside tied embeddings must repeat them, or dropping it would change the model."""
    head = reader.tensors.get(TIED_HEAD)
    if not tied or head is None:
        return
    if not torch.equal(reader.read(head), reader.read(reader.tensors[EMBEDDINGS])):
        raise ModelError(
            f"config.json has tie_word_embeddings: true, but {TIED_HEAD} differs from {EMBEDDINGS};"
            " set it to false to use both.",
            param="tie_word_embeddings",
        )


def _allocate(model: DecoderForCausalLM, device: torch.device) -> None:
    """Replace meta parameters by uninitialised ones on the device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Not empty_like: of a meta tensor it imports a symbolic algebra, most of a second.
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    config = model.config
    num_positions = model.model.cos_sin_cache.shape[0]
    model.model.cos_sin_cache = compute_cos_sin_cache(config.rope, config.head_dim, num_positions, device)


def _copy_tensors(
    model: DecoderForCausalLM, reader: CheckpointReader, layout: dict[str, Destination], progress: Progress
) -> None:
    """Copy in the order of the files, so that the disk reads forward."""
    parameters = dict(model.named_parameters())
    wanted = [stored for stored in reader.tensors.values() if stored.name in layout]
    num_bytes, num_bytes_done = sum(stored.num_bytes for stored in wanted), 0
    progress(0, num_bytes)
    for stored in wanted:
        destination = layout[stored.name]
        rows = parameters[destination.parameter].data[destination.start : destination.start + stored.shape[0]]
        rows.copy_(reader.read(stored))
        num_bytes_done += stored.num_bytes
        progress(num_bytes_done, num_bytes)


def _fill_randomly(model: DecoderForCausalLM, seed: int) -> None:
    """Uniform weights with the standard deviation of fresh ones; norms 1 and biases 0, as in training.

    Each parameter has a generator of its own, so its values depend on the seed, its name, shape and dtype
    only.
    """
    half_width = model.config.initializer_range * 3**0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith(".bias") else 1.0)
            continue
        generator = torch.Generator(parameter.device)
        # 32 bits, because the CPU's generator drops the rest of its seed.
        generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        parameter.data.uniform_(-half_width, half_width, generator=generator)
