"""The table of cosines and sines that the rotary embedding reads.

Knows the formulas of each ``rope_type``; the rotation itself is ``workers.kernels.functional.apply_rope``.

Shape suffixes: P = positions, D = head size, F = D / 2 frequencies.
"""

from __future__ import annotations

import math

import torch

from workers.model.rope_config import RopeConfig


def compute_cos_sin_cache(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> torch.Tensor:
    """fp32 ``[P, D]``: cosines in the first half of each row, sines in the second.

    Computed on the CPU whatever the device, so that every device rotates by the same angles.
    """
    if device.type == "meta":
        return torch.empty(num_positions, head_dim, device=device, dtype=torch.float32)
    inv_freq_F = compute_inv_freq(rope, head_dim)
    angles_PF = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq_F
    cache_PD = torch.cat((angles_PF.cos(), angles_PF.sin()), dim=-1) * rope.attention_factor
    return cache_PD.to(device)


def compute_inv_freq(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, fp32 ``[F]`` on the CPU."""
    inv_freq_F = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.rope_type == "linear":
        return inv_freq_F / rope.factor
    if rope.rope_type == "llama3":
        return _stretch_llama3(rope, inv_freq_F)
    if rope.rope_type == "yarn":
        return _stretch_yarn(rope, inv_freq_F, head_dim)
    assert rope.rope_type == "default", rope.rope_type
    return inv_freq_F


def _stretch_llama3(rope: RopeConfig, inv_freq_F: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, and those between blended."""
    wavelen_F = 2 * math.pi / inv_freq_F
    context = rope.original_max_position_embeddings
    smooth_F = (context / wavelen_F - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended_F = (1 - smooth_F) * inv_freq_F / rope.factor + smooth_F * inv_freq_F
    stretched_F = torch.where(wavelen_F > context / rope.low_freq_factor, inv_freq_F / rope.factor, blended_F)
    return torch.where(wavelen_F < context / rope.high_freq_factor, inv_freq_F, stretched_F)


def _stretch_yarn(rope: RopeConfig, inv_freq_F: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al., 2023), section 3.2: a ramp over dimensions from kept to stretched."""

    def dimension_turning(num_rotations: float) -> float:
        per_radian = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return head_dim * math.log(per_radian) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp_F = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inv_freq_F / rope.factor * ramp_F + inv_freq_F * (1 - ramp_F)
