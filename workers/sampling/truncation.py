"""Which tokens a random row may take: min-p, top-k and top-p as one threshold per row.

All three keep the most likely tokens, so what they keep is "every token whose logit reaches a threshold". Taken
literally, that settles ties: tokens as likely as the last one kept are kept too (vLLM and transformers do so for
top-k; for top-p they drop some, depending on how a sort orders equal values). It also makes the result independent
of how the threshold was found, by sorting the vocabulary or a part of it, because probabilities are whole numbers
here (:func:`integer_weights`), whose sums have no rounding and no order.

The order is vLLM's: min-p looks at all tokens, top-k at those left, and top-p takes its share of what is then left.

Shape suffixes: R rows, V vocabulary, K candidates in descending order.
"""

from __future__ import annotations

import math

import torch

from workers.sampling.plan import SamplingPlan
from workers.sampling.rows import SamplingRows
from workers.sampling.selection import top_k

_FLOAT64_INTEGER_BITS = 53


def integer_weights(scaled_RV: torch.Tensor) -> torch.Tensor:
    """Unnormalised probabilities in fixed point: ``exp(x) * 2**b``, rounded down, as whole float64 numbers.

    ``b`` is as large as it can be with every sum of a row below 2**53, hence exact in any order: 37 for a
    vocabulary of 49152, 35 for 151936. Rounding moves at most ``V * 2**-b`` (4e-6) of the most likely token's
    mass; a token that is less likely than ``2**-b`` of it gets weight 0 and is never drawn.

    Args:
        scaled_RV: float32 logits with the row's maximum subtracted, divided by the temperature; at most 0.
    """
    fraction_bits = _FLOAT64_INTEGER_BITS - (scaled_RV.shape[1] - 1).bit_length()
    return scaled_RV.exp().mul_(2.0**fraction_bits).trunc_().to(torch.float64)


def keep_threshold(
    scaled_RV: torch.Tensor, weights_RV: torch.Tensor, rows: SamplingRows, plan: SamplingPlan
) -> torch.Tensor:
    """The smallest logit that each row keeps, with fixed shapes and without waiting for the device.

    Args:
        scaled_RV: float32, as for :func:`integer_weights`.
        weights_RV: Their weights.

    Returns:
        float32 [R, 1]; -inf where a row keeps everything.
    """
    vocab_size = scaled_RV.shape[1]
    # p_i >= min_p * p_max is x_i >= log(min_p), as the largest x is 0.
    threshold_R1 = rows.log_min_p
    if plan.num_candidates == 0:
        return threshold_R1
    if plan.num_candidates < vocab_size:
        sorted_RK, ids_RK = top_k(scaled_RV, plan.num_candidates)
    else:
        sorted_RK, ids_RK = scaled_RV.sort(dim=-1, descending=True)
    if plan.any_top_k:
        last_R1 = sorted_RK.gather(1, (rows.top_k - 1).clamp(max=sorted_RK.shape[1] - 1))
        last_R1 = last_R1.masked_fill(rows.top_k >= vocab_size, -math.inf)
        threshold_R1 = torch.maximum(threshold_R1, last_R1)
    if plan.any_top_p:
        total_R1 = weights_RV.masked_fill(scaled_RV < threshold_R1, 0.0).sum(dim=-1, keepdim=True)
        weights_RK = weights_RV.gather(1, ids_RK).masked_fill(sorted_RK < threshold_R1, 0.0)
        before_RK = weights_RK.cumsum(dim=-1) - weights_RK
        num_kept_R1 = (before_RK < rows.top_p.double() * total_R1).sum(dim=-1, keepdim=True)
        last_R1 = sorted_RK.gather(1, (num_kept_R1 - 1).clamp(min=0))
        threshold_R1 = torch.where(rows.top_p < 1, torch.maximum(threshold_R1, last_R1), threshold_R1)
    return threshold_R1
