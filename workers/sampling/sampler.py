"""From logits to tokens, for a whole step at once.

Everything here runs on the device with fixed shapes and without waiting for it, so that it can be part of a
captured graph; on a CPU, penalties and truncation take a shortcut with the same result. The order of operations is
vLLM's: min_tokens, logit bias, penalties, then the most likely token, or temperature, min-p, top-k, top-p and a draw.
A row's token depends on its own logits, parameters, seed and position alone.

Knows nothing about requests, scheduling or text.

Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from workers.sampling.by_row import choose_by_row, penalise_by_row, runs_by_row
from workers.sampling.draw import draw
from workers.sampling.logprobs import LogprobsTensors, compute_logprobs
from workers.sampling.philox import philox_uniform
from workers.sampling.plan import SamplingPlan
from workers.sampling.rows import SamplingRows
from workers.sampling.selection import first_argmax
from workers.sampling.state import SamplingState
from workers.sampling.transforms import add_logit_bias, apply_penalties, mask_stop_ids
from workers.sampling.truncation import integer_weights, keep_threshold


class SamplerOutput(NamedTuple):
    """What a step sampled, on the device.

    Attributes:
        token_ids_R: int64.
        logprobs: With the plan's number of alternatives, or None if the plan asks for no logprobs.
    """

    token_ids_R: torch.Tensor
    logprobs: LogprobsTensors | None


class Sampler:
    """Samples one token per row, with the parameters that ``state`` holds for the rows' slots."""

    def __init__(self, state: SamplingState) -> None:
        self._state = state

    def sample(
        self,
        logits_RV: torch.Tensor,
        slots_R: torch.Tensor,
        num_output_R: torch.Tensor,
        plan: SamplingPlan,
    ) -> SamplerOutput:
        """Choose every row's next token.

        Counts the tokens towards the penalties of later steps, where the plan has any.

        Args:
            logits_RV: Raw logits; any floating dtype, computed in float32 where that matters. Left as they are.
            slots_R: int64, each row's slot; ``state.padding_slot`` in padding rows. Other slots are distinct.
            num_output_R: int64, index in the request's output of the token being sampled: 0 for its first one.
            plan: ``state.plan`` of these slots, or any plan that covers it.
        """
        token_ids_R = self._choose(logits_RV, slots_R, num_output_R, plan)
        if plan.any_penalties:
            self._count(slots_R, token_ids_R)
        if plan.num_logprobs < 0:
            return SamplerOutput(token_ids_R, None)
        return SamplerOutput(token_ids_R, compute_logprobs(logits_RV, token_ids_R, plan.num_logprobs))

    def _choose(
        self, logits_RV: torch.Tensor, slots_R: torch.Tensor, num_output_R: torch.Tensor, plan: SamplingPlan
    ) -> torch.Tensor:
        if plan.all_greedy and not plan.changes_logits:
            return first_argmax(logits_RV)
        rows = self._state.gather(slots_R)
        logits_RV = self._transform(logits_RV.float(), slots_R, num_output_R, rows, plan)
        greedy_R = first_argmax(logits_RV)
        if plan.all_greedy:
            return greedy_R
        # Subtracting the maximum first keeps the quotient finite at any temperature.
        maximum_R1 = logits_RV.gather(1, greedy_R[:, None])
        scaled_RV = (logits_RV - maximum_R1).div_(rows.temperature)
        random_R = self._draw(scaled_RV, philox_uniform(rows.seed_R, num_output_R), rows, plan)
        return torch.where(rows.is_greedy.squeeze(1), greedy_R, random_R)

    @staticmethod
    def _draw(scaled_RV: torch.Tensor, uniform_R: torch.Tensor, rows: SamplingRows, plan: SamplingPlan) -> torch.Tensor:
        weights_RV = integer_weights(scaled_RV)
        if not plan.truncates:
            return draw(weights_RV, uniform_R)
        if runs_by_row(scaled_RV):
            return choose_by_row(scaled_RV, weights_RV, rows, uniform_R)
        threshold_R1 = keep_threshold(scaled_RV, weights_RV, rows, plan)
        return draw(weights_RV.masked_fill_(scaled_RV < threshold_R1, 0.0), uniform_R)

    def _transform(
        self,
        logits_RV: torch.Tensor,
        slots_R: torch.Tensor,
        num_output_R: torch.Tensor,
        rows: SamplingRows,
        plan: SamplingPlan,
    ) -> torch.Tensor:
        state = self._state
        if plan.any_min_tokens:
            masked_R1 = num_output_R[:, None] < rows.min_tokens
            logits_RV = mask_stop_ids(logits_RV, state.stop_ids_RK(slots_R), masked_R1)
        if plan.any_logit_bias:
            logits_RV = add_logit_bias(logits_RV, *state.logit_bias_RB(slots_R), rows.num_logit_bias)
        if plan.any_penalties and runs_by_row(logits_RV):
            logits_RV = penalise_by_row(logits_RV, state.counts_SV, slots_R, rows)
        elif plan.any_penalties:
            logits_RV = apply_penalties(logits_RV, state.counts_SV.index_select(0, slots_R), rows)
        return logits_RV

    def _count(self, slots_R: torch.Tensor, token_ids_R: torch.Tensor) -> None:
        # Not an accumulating write: real slots are distinct, and what padding rows leave behind is never read.
        counts_SV = self._state.counts_SV
        counts_SV[slots_R, token_ids_R] = counts_SV[slots_R, token_ids_R] + 1
