"""The model's small operations in plain torch: the formulas, and what runs where there is no faster kernel.

Every function computes in fp32 and rounds once at the end, so that a bf16 result is at least as accurate as the
usual chain of bf16 operations. Knows nothing of layers, batches or caches.

Shape suffixes: T = tokens, N = features, H = query heads, K = KV heads, D = head size, P = positions,
F = D / 2 frequencies.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019).

    Args:
        x: ``[..., N]``, any floating dtype.
        weight: ``[N]``.
    """
    x32 = x.float()
    inverse_rms = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * (x32 * inverse_rms)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)``; the sum is rounded first, as it is kept."""
    new_residual = x + residual
    return rms_norm(new_residual, weight, eps), new_residual


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's gate: ``silu(gate) * up`` of ``[..., 2N]`` = cat(gate, up), giving ``[..., N]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate_up.dtype)


def apply_rope(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor, cos_sin_cache_PD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding (Su et al., 2021), GPT-NeoX layout: dimension i turns with dimension i + D/2.

    Args:
        q_THD: Queries.
        k_TKD: Keys.
        positions_T: int64 position of each token, a row of the cache.
        cos_sin_cache_PD: fp32, ``cat(cos, sin)`` with D/2 columns each.

    Returns:
        Rotated q and k, in new tensors of the same shapes and dtypes.
    """
    cos_T1F, sin_T1F = cos_sin_cache_PD[positions_T].unsqueeze(1).chunk(2, dim=-1)
    return _rotate(q_THD, cos_T1F, sin_T1F), _rotate(k_TKD, cos_T1F, sin_T1F)


def _rotate(x_THD: torch.Tensor, cos_T1F: torch.Tensor, sin_T1F: torch.Tensor) -> torch.Tensor:
    first, second = x_THD.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos_T1F - second * sin_T1F, second * cos_T1F + first * sin_T1F), dim=-1)
    return rotated.to(x_THD.dtype)
