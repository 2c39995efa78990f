"""What a fusion pass puts in place of the model's operations: the same arithmetic, in a form that becomes one kernel.

Plain torch on purpose: Inductor turns it into the kernel wanted, for every device and piece format, and a package needs
no Python to run it. :mod:`workers.kernels.reference` says what is computed.

Shape suffixes: T = tokens, N = features, H = query heads, K = KV heads, J = H + K, D = head size, F = D / 2
frequencies, P = positions.
"""

from __future__ import annotations

import torch

from workers.kernels import reference


def rotate_qk(
    qkv_TN: torch.Tensor,
    head_sizes: tuple[int, int, int],
    positions_T: torch.Tensor,
    cos_sin_cache_PD: torch.Tensor,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of a fused projection, normalised if there are norm weights, and rotated: all heads at once.

    Args:
        qkv_TN: ``[T, (H + 2K) * D]``.
        head_sizes: H, K and D.
        positions_T: int64 position of each token.
        cos_sin_cache_PD: fp32, as :func:`reference.apply_rope` takes it.
        norm_weights: ``[D]`` of the queries' norm and of the keys'.
        eps: Of the norms.

    Returns:
        q ``[T, H, D]`` and k ``[T, K, D]``, both views of one tensor.
    """
    num_heads, num_kv_heads, head_dim = head_sizes
    num_rotated = num_heads + num_kv_heads
    qk_TJD = qkv_TN[:, : num_rotated * head_dim].view(-1, num_rotated, head_dim)
    if norm_weights is not None:
        q_weight_D, k_weight_D = norm_weights
        weight_JD = torch.cat((q_weight_D.expand(num_heads, head_dim), k_weight_D.expand(num_kv_heads, head_dim)))
        qk_TJD = reference.rms_norm(qk_TJD, weight_JD, eps)
    cos_T1F, sin_T1F = cos_sin_cache_PD[positions_T].unsqueeze(1).chunk(2, dim=-1)
    # The halves change places by a change of indices, which a compiler fuses; joining two results, it might not.
    halves_TJ2F = qk_TJD.float().view(-1, num_rotated, 2, head_dim // 2)
    sin_T12F = torch.stack((-sin_T1F, sin_T1F), dim=-2)
    rotated_TJ2F = halves_TJ2F * cos_T1F.unsqueeze(-2) + halves_TJ2F.flip(-2) * sin_T12F
    rotated_TJD = rotated_TJ2F.to(qkv_TN.dtype).view(-1, num_rotated, head_dim)
    return rotated_TJD[:, :num_heads], rotated_TJD[:, num_heads:]
