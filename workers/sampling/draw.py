"""One random token per row by inverting the cumulative distribution.

With counter-based random numbers an inverse CDF needs one number per row; the exponential race ("Gumbel-max"), the
usual choice with a stateful generator, would need one per token of the vocabulary, that is, a hundred thousand
Philox evaluations per row and step. The inverse CDF's usual fault, that a long float sum loses small terms and
depends on the order of summation, does not arise with whole-number weights: sums are exact, so a row's token is the
same whatever the batch's shape and whichever kernel does the summing.

Shape suffixes: R rows, V vocabulary, N blocks, B tokens of a block.
"""

from __future__ import annotations

import torch

from workers.sampling.selection import BLOCK_SIZE, split_blocks


def draw(weights_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative weight exceeds ``uniform`` times the total.

    Two levels, so that the long axis is summed (vectorised) and only a short one is cumulated.

    Args:
        weights_RV: float64, whole and not negative; sums of a row at most 2**53.
        uniform_R: float64 in [0, 1), multiples of 2**-53.

    Returns:
        int64 [R]. A token of weight 0 is never returned, unless the whole row is 0.
    """
    vocab_size = weights_RV.shape[1]
    blocks_RNB, tail_RT = split_blocks(weights_RV)
    sums_RN = torch.cat((blocks_RNB.sum(dim=-1), tail_RT.sum(dim=-1, keepdim=True)), dim=1)
    ends_RN = sums_RN.cumsum(dim=-1)
    # The product rounds to less than the total, as uniform is at most 1 - 2**-53.
    target_R1 = (uniform_R[:, None] * ends_RN[:, -1:]).floor()
    block_R1 = (ends_RN <= target_R1).sum(dim=-1, keepdim=True).clamp(max=sums_RN.shape[1] - 1)
    target_R1 = target_R1 - (ends_RN - sums_RN).gather(1, block_R1)
    ids_RB = block_R1 * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=weights_RV.device)
    inside_RB = weights_RV.gather(1, ids_RB.clamp(max=vocab_size - 1)).masked_fill(ids_RB >= vocab_size, 0.0)
    offset_R1 = (inside_RB.cumsum(dim=-1) <= target_R1).sum(dim=-1, keepdim=True)
    return (block_R1 * BLOCK_SIZE + offset_R1).clamp(max=vocab_size - 1).squeeze(1)
