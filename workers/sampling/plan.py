"""Which parts of sampling a step needs, decided on the host.

A plan says nothing about single requests: it is the union over the batch, so that a greedy batch costs one argmax
and a step never runs a transform that no request asked for. It is small and hashable, because a captured graph
contains sampling: a plan selects which graph can be replayed. A row's token does not depend on the plan it was
sampled under, as long as the plan covers what the row needs.
"""

from __future__ import annotations

from typing import NamedTuple

from workers.sampling_params import MAX_LOGPROBS

#: Values of ``SamplingPlan.num_candidates`` below the whole vocabulary. Few, so that plans stay few.
CANDIDATE_BUCKETS = (64, 1024)
#: Values of ``SamplingPlan.num_logprobs`` above -1: a plan asks for the next larger one.
LOGPROB_BUCKETS = (0, 5, MAX_LOGPROBS)


class SamplingPlan(NamedTuple):
    """Union of what the rows of one step need.

    Attributes:
        all_greedy: Every row takes its most likely token, so no random numbers and no truncation.
        any_top_k: Some random row has a top-k.
        any_top_p: Some random row has a top-p below 1.
        any_min_p: Some random row has a min-p above 0.
        num_candidates: Most likely tokens per row that top-k and top-p need to see in order: one of
            ``CANDIDATE_BUCKETS`` or the vocabulary's size; 0 without top-k and top-p.
        any_min_tokens: Some row may have to keep its stop tokens masked.
        any_logit_bias: Some row has a logit bias.
        any_penalties: Some row has a repetition, presence or frequency penalty.
        num_logprobs: Alternatives to report per row, one of ``LOGPROB_BUCKETS``; -1 reports no logprobs.
    """

    all_greedy: bool = True
    any_top_k: bool = False
    any_top_p: bool = False
    any_min_p: bool = False
    num_candidates: int = 0
    any_min_tokens: bool = False
    any_logit_bias: bool = False
    any_penalties: bool = False
    num_logprobs: int = -1

    @property
    def changes_logits(self) -> bool:
        """Whether some transform comes before the choice between greedy and random."""
        return self.any_min_tokens or self.any_logit_bias or self.any_penalties

    @property
    def truncates(self) -> bool:
        """Whether some random row may take only a part of the vocabulary."""
        return self.any_min_p or self.num_candidates > 0


#: The common case: nothing but an argmax.
GREEDY_PLAN = SamplingPlan()


def bucket(value: int, buckets: tuple[int, ...], otherwise: int) -> int:
    """The smallest of ``buckets`` that is at least ``value``, or ``otherwise``."""
    return next((size for size in buckets if size >= value), otherwise)
