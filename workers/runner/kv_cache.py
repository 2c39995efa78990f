"""How many KV blocks fit, and the tensors that hold them.

Sizing rules only; which request owns which block is the scheduler's business.
"""

from __future__ import annotations

import torch

from workers.attention.base import AttentionBackend
from workers.config import EngineConfig
from workers.errors import ConfigError

#: KV memory on a CPU when the config names none.
_DEFAULT_CPU_BYTES = 1 << 30


def block_bytes(backend: AttentionBackend, num_layers: int) -> int:
    """Bytes of one block over all layers."""
    numel = 1
    for size in backend.kv_cache_shape(1):
        numel *= size
    return numel * backend.spec.dtype.itemsize * num_layers


def plan_num_blocks(
    config: EngineConfig, bytes_per_block: int, max_model_len: int, available: int | None = None
) -> int:
    """Decide the number of KV blocks.

    ``num_gpu_blocks_override`` wins, then ``kv_cache_memory_bytes``, then what the device has left (CUDA) or 1 GiB
    (CPU), and never more than ``max_num_seqs`` requests of ``max_model_len`` tokens could use.

    Args:
        available: Bytes left on the device; None where it has no memory of its own.

    Raises:
        ConfigError: Not even one request of ``max_model_len`` tokens fits; says what to change.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    blocks_per_seq = -(-max_model_len // config.block_size)
    useful = config.max_num_seqs * blocks_per_seq + 1
    if config.kv_cache_memory_bytes is not None:
        budget = config.kv_cache_memory_bytes
    elif available is not None:
        budget = available
    else:
        budget = _DEFAULT_CPU_BYTES
    num_blocks = min(budget // bytes_per_block, useful)
    if num_blocks < blocks_per_seq + 1:
        raise ConfigError(
            f"The KV cache holds {max(num_blocks, 0)} blocks of {config.block_size} tokens, fewer than the "
            f"{blocks_per_seq + 1} that one request of max_model_len={max_model_len} needs: lower max_model_len, or "
            f"raise {'kv_cache_memory_bytes' if available is None else 'gpu_memory_utilization'}.",
            param="max_model_len",
        )
    return num_blocks


def allocate_kv_caches(
    backend: AttentionBackend, num_layers: int, num_blocks: int, device: torch.device
) -> list[torch.Tensor]:
    """One zeroed cache tensor per layer, of ``backend.kv_cache_shape(num_blocks)``."""
    shape = backend.kv_cache_shape(num_blocks)
    return [torch.zeros(shape, dtype=backend.spec.dtype, device=device) for _ in range(num_layers)]
