"""What a request may do to its logits before a token is chosen: min_tokens, logit bias, penalties.

The order is vLLM's (``v1/sample/sampler.py``). Every function returns a new tensor, has fixed shapes and never
waits for the device; in a row without the feature the values come out bit for bit as they went in.

Shape suffixes: R rows, V vocabulary, K stop ids, B biases.
"""

from __future__ import annotations

import math

import torch

from workers.sampling.rows import SamplingRows
from workers.sampling.state import PROMPT_BIT


def mask_stop_ids(logits_RV: torch.Tensor, stop_ids_RK: torch.Tensor, masked_R1: torch.Tensor) -> torch.Tensor:
    """-inf at the stop ids of the rows in which ``masked_R1`` (bool) is set."""
    # Repeated ids write the same value, so the result does not depend on the order of the writes.
    kept_RK = logits_RV.gather(1, stop_ids_RK)
    return logits_RV.scatter(1, stop_ids_RK, kept_RK.masked_fill(masked_R1, -math.inf))


def add_logit_bias(
    logits_RV: torch.Tensor, ids_RB: torch.Tensor, values_RB: torch.Tensor, num_R1: torch.Tensor
) -> torch.Tensor:
    """Add the first ``num_R1`` biases of every row; a row's own ids are distinct."""
    position_B = torch.arange(ids_RB.shape[1], device=ids_RB.device)
    return logits_RV.scatter_add(1, ids_RB, values_RB.masked_fill(position_B >= num_R1, 0.0))


def apply_penalties(logits_RV: torch.Tensor, counts_RV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Repetition, then frequency, then presence penalty.

    Repetition (Keskar et al., 2019, eq. in section 4.1, in the form every engine uses) divides positive logits
    and multiplies negative ones, for tokens of prompt and output; frequency and presence are OpenAI's and look at
    the output alone.

    Args:
        counts_RV: int32, see ``SamplingState.counts_SV``.
    """
    penalty_RV = torch.where(counts_RV != 0, rows.repetition_penalty, 1.0)
    logits_RV = torch.where(logits_RV > 0, logits_RV / penalty_RV, logits_RV * penalty_RV)
    occurrences_RV = (counts_RV & (PROMPT_BIT - 1)).to(torch.float32)
    logits_RV = logits_RV - rows.frequency_penalty * occurrences_RV
    return logits_RV - rows.presence_penalty * (occurrences_RV > 0)
