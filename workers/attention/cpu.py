"""Paged attention of the CPU: one native call per layer that writes the cache and attends.

Knows how to describe a step to the C++ kernel; the arithmetic is in workers/kernels/cpu_attention.cpp.

Shape suffixes: T = tokens of the batch (padded), H = query heads, K = KV heads, D = head size, S = block size,
B = physical blocks.
"""

from __future__ import annotations

import ctypes
import dataclasses

import torch

from workers.attention.base import AttentionBackend, AttentionSpec, BatchGeometry
from workers.errors import ConfigError
from workers.kernels import cpu_ops
from workers.modes import AttentionCGSupport


@dataclasses.dataclass(frozen=True, slots=True)
class CpuMetadata:
    """One step, ready for every layer.

    Attributes:
        step: What the kernel reads.
        geometry: Keeps the memory alive that ``step`` points into.
    """

    step: cpu_ops.AttentionStep
    geometry: BatchGeometry


class CpuPagedAttention(AttentionBackend):
    """Native attention over bf16 and fp32 caches, grouped queries and sliding windows included.

    Raises:
        ConfigError: float16, or the native kernels cannot be built here.
    """

    name = "cpu"
    cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        if not cpu_ops.supports(spec.dtype):
            raise ConfigError(f"attention_backend 'cpu' does not compute in {spec.dtype}; use 'sdpa'.")
        if not cpu_ops.is_available():
            raise ConfigError("attention_backend 'cpu' needs the native kernels; use 'sdpa'.")

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        """``[B, 2, K, S, D]``: what one KV head reads of a block is contiguous."""
        s = self.spec
        return (num_blocks, 2, s.num_kv_heads, s.block_size, s.head_dim)

    def build_metadata(self, geometry: BatchGeometry) -> CpuMetadata:
        """Addresses and sizes of the step; copies nothing."""
        spec = self.spec
        assert geometry.block_table_RM.stride(-1) == 1
        step = cpu_ops.AttentionStep(
            num_reqs=geometry.num_reqs,
            num_tokens=geometry.num_tokens,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=spec.block_size,
            window=spec.sliding_window or 0,
            block_table_stride=geometry.block_table_RM.stride(0),
            query_start_loc=geometry.query_start_loc.data_ptr(),
            seq_lens=geometry.seq_lens.data_ptr(),
            block_table=geometry.block_table_RM.data_ptr(),
            slot_mapping=geometry.slot_mapping_T.data_ptr(),
            scale=spec.scale,
            is_bf16=spec.dtype is torch.bfloat16,
            threads=torch.get_num_threads(),
        )
        return CpuMetadata(step, geometry)

    def forward(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: CpuMetadata,
        out_THD: torch.Tensor,
    ) -> None:
        """See the interface; padding rows of ``out_THD`` become zero."""
        cpu_ops.paged_attention(q_THD, k_TKD, v_TKD, kv_cache, ctypes.byref(metadata.step), out_THD)
        num_tokens = metadata.geometry.num_tokens
        if num_tokens < out_THD.shape[0]:
            out_THD[num_tokens:].zero_()
