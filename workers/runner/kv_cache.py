"""How many KV blocks fit, and the tensors that hold them.

Sizing rules only; which request owns which block is the scheduler's business.
"""

from __future__ import annotations

import dataclasses
import logging

import torch

from workers.attention.base import AttentionBackend
from workers.config import EngineConfig
from workers.errors import ConfigError

logger = logging.getLogger(__name__)

#: KV memory on a CPU when the config names none.
_DEFAULT_CPU_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryProfile:
    """What the profiling run found on the device, in bytes.

    Attributes:
        total: The device's memory.
        available: What is left for the KV cache once weights, peak activations and whatever else lives on the
            device are taken from ``total * gpu_memory_utilization``.
        peak_activations: Peak of the profiling forward above the weights.
    """

    total: int
    available: int
    peak_activations: int


def block_bytes(backend: AttentionBackend, num_layers: int) -> int:
    """Bytes of one block over all layers."""
    numel = 1
    for size in backend.kv_cache_shape(1):
        numel *= size
    return numel * backend.spec.dtype.itemsize * num_layers


def plan_num_blocks(
    config: EngineConfig, bytes_per_block: int, max_model_len: int, profile: MemoryProfile | None
) -> int:
    """Decide the number of KV blocks.

    ``num_gpu_blocks_override`` wins, then ``kv_cache_memory_bytes``, then the profile (CUDA) or 1 GiB (CPU), and
    never more than ``max_num_seqs`` requests of ``max_model_len`` tokens could use.

    Raises:
        ConfigError: Not even one request of ``max_model_len`` tokens fits; says what to change.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    blocks_per_seq = -(-max_model_len // config.block_size)
    useful = config.max_num_seqs * blocks_per_seq + 1
    if config.kv_cache_memory_bytes is not None:
        budget = config.kv_cache_memory_bytes
    elif profile is not None:
        budget = profile.available
    else:
        budget = _DEFAULT_CPU_BYTES
    num_blocks = min(budget // bytes_per_block, useful)
    if num_blocks < blocks_per_seq + 1:
        raise ConfigError(
            f"The KV cache holds {max(num_blocks, 0)} blocks of {config.block_size} tokens, fewer than the "
            f"{blocks_per_seq + 1} that one request of max_model_len={max_model_len} needs: lower max_model_len, or "
            f"raise {'kv_cache_memory_bytes' if profile is None else 'gpu_memory_utilization'}.",
            param="max_model_len",
        )
    return num_blocks


def allocate_kv_caches(
    backend: AttentionBackend, num_layers: int, num_blocks: int, device: torch.device
) -> list[torch.Tensor]:
    """One zeroed cache tensor per layer, of ``backend.kv_cache_shape(num_blocks)``."""
    shape = backend.kv_cache_shape(num_blocks)
    return [torch.zeros(shape, dtype=backend.spec.dtype, device=device) for _ in range(num_layers)]


def cuda_memory_profile(config: EngineConfig, device: torch.device, peak_activations: int) -> MemoryProfile:
    """Read the device's memory after a profiling run.

    Raises:
        ConfigError: Another process holds so much of the device that ``gpu_memory_utilization`` cannot be met.
    """
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    used = total - free - cached
    available = int(total * config.gpu_memory_utilization) - used - peak_activations
    if available > free + cached:
        raise ConfigError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} of {total / 2**30:.1f} GiB cannot be had: only "
            f"{(free + cached) / 2**30:.1f} GiB are free; lower it or free the device.",
            param="gpu_memory_utilization",
        )
    return MemoryProfile(total, available, peak_activations)
