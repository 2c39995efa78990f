"""Log-probabilities of tokens from raw logits, for sampled tokens and prompts alike.

Raw means before penalties, bias and temperature, as in vLLM's default ``logprobs_mode``.

Shape suffixes: N positions, V vocabulary, K alternatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from workers.outputs import Logprob, PositionLogprobs
from workers.sampling.selection import top_k


class LogprobsTensors(NamedTuple):
    """Log-probabilities of N positions, on the device.

    Attributes:
        chosen_N: float32, of each position's token.
        rank_N: int64, 1 plus the number of tokens that are more likely.
        top_values_NK: float32, of the most likely tokens, largest first.
        top_ids_NK: int64, their ids.
    """

    chosen_N: torch.Tensor
    rank_N: torch.Tensor
    top_values_NK: torch.Tensor
    top_ids_NK: torch.Tensor

    def to_lists(self) -> LogprobsLists:
        """Copy to the host; waits for the device."""
        chosen, rank, top_values, top_ids = (tensor.tolist() for tensor in self)
        return LogprobsLists(chosen, rank, top_values, top_ids)


@dataclasses.dataclass(frozen=True, slots=True)
class LogprobsLists:
    """``LogprobsTensors`` on the host."""

    chosen: list[float]
    rank: list[int]
    top_values: list[list[float]]
    top_ids: list[list[int]]

    def position(
        self, row: int, token_id: int, num_top: int, decode: Callable[[int], str] | None = None
    ) -> PositionLogprobs:
        """One position as the engine hands it out: the chosen token first, then up to ``num_top`` alternatives.

        Args:
            row: Which position.
            token_id: The token that ``chosen`` and ``rank`` are of.
            num_top: What the request asked for; these lists may hold more.
            decode: Text of a token id, or None without a tokenizer.
        """

        def entry(token_id: int, logprob: float, rank: int) -> Logprob:
            return Logprob(logprob, rank, decode(token_id) if decode else None)

        result = {token_id: entry(token_id, self.chosen[row], self.rank[row])}
        top_ids = self.top_ids[row][:num_top]
        if token_id not in top_ids and self.rank[row] <= num_top:
            top_ids = top_ids[:-1]  # as likely as the last of them, whose place it takes
        for rank, (top_id, value) in enumerate(zip(top_ids, self.top_values[row], strict=False), start=1):
            if top_id != token_id:
                result[top_id] = entry(top_id, value, rank)
        return result


def compute_logprobs(logits_NV: torch.Tensor, token_ids_N: torch.Tensor, num_top: int) -> LogprobsTensors:
    """Log-probability and rank of one token per position, and the most likely alternatives.

    Needs a few bytes per logit besides the logits; long prompts are best given in pieces.

    Args:
        logits_NV: Raw logits, any floating dtype; computed in float32.
        token_ids_N: int64, the sampled tokens, or the prompt tokens that follow each position.
        num_top: Alternatives per position; 0 for none.
    """
    logits_NV = logits_NV.float()
    normaliser_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    chosen_N1 = logits_NV.gather(1, token_ids_N[:, None])
    rank_N = (logits_NV > chosen_N1).sum(dim=-1) + 1
    top_values_NK, top_ids_NK = top_k(logits_NV, min(num_top, logits_NV.shape[1]))
    return LogprobsTensors((chosen_N1 - normaliser_N1).squeeze(1), rank_N, top_values_NK - normaliser_N1, top_ids_NK)
