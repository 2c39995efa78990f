"""The model's small operations, each by the best kernel for the device of its first argument.

On a CPU they are opaque operators (``torch.ops.warmgraph``) with native kernels. Elsewhere they are plain torch,
which a compiler sees through and fuses. :mod:`workers.kernels.reference` says what they compute.

Shape suffixes: T = tokens, N = features, H = query heads, K = KV heads, D = head size, P = positions, V = rows of a
table.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

import workers.kernels.cpu_ops  # noqa: F401  (defines the operators)
from workers.kernels import reference


def embedding(ids_T: torch.Tensor, weight_VN: torch.Tensor) -> torch.Tensor:
    """Rows ``ids_T`` (int64) of a table: ``[T, N]``."""
    if not ids_T.is_cpu:
        return F.embedding(ids_T, weight_VN)
    rows: torch.Tensor = torch.ops.warmgraph.embedding(ids_T, weight_VN)
    return rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension: ``[..., N]`` with weight ``[N]``."""
    if not x.is_cpu:
        return reference.rms_norm(x, weight, eps)
    y: torch.Tensor = torch.ops.warmgraph.rms_norm(x, weight, eps)
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)``, both ``[..., N]``."""
    if not x.is_cpu:
        return reference.add_rms_norm(x, residual, weight, eps)
    y, new_residual = torch.ops.warmgraph.add_rms_norm(x, residual, weight, eps)
    return y, new_residual


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``[..., 2N]`` = cat(gate, up), giving ``[..., N]``."""
    if not gate_up.is_cpu:
        return reference.silu_and_mul(gate_up)
    y: torch.Tensor = torch.ops.warmgraph.silu_and_mul(gate_up)
    return y


def apply_rope(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor, cos_sin_cache_PD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k by their positions (int64), with rows cat(cos, sin) of the fp32 cache; new tensors."""
    if not q_THD.is_cpu:
        return reference.apply_rope(q_THD, k_TKD, positions_T, cos_sin_cache_PD)
    q, k = torch.ops.warmgraph.apply_rope(q_THD, k_TKD, positions_T, cos_sin_cache_PD)
    return q, k
