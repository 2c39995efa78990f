"""What the scheduler says: to the runner, what to compute; to the output processor, what came of it.

Plain messages. How steps overlap, and what the runner may rely on then, is described in ``scheduler.py``.
"""

from __future__ import annotations

import dataclasses

from workers.outputs import FinishReason
from workers.request import Request


@dataclasses.dataclass(slots=True)
class ScheduledRequest:
    """One request's share of a step.

    Attributes:
        request: The request; the runner reads ``token_ids`` and ``block_ids`` and changes nothing. Where
            ``num_computed_tokens`` is not below ``len(token_ids)``, the one token to compute is not known on
            the host: it is the one that the previous step sampled for this request.
        num_computed_tokens: Position of the first token computed in this step.
        num_tokens: Tokens computed in this step (the query length); 1 for a decode.
        samples: Whether the step reaches the end of the request's tokens, so that its last row is sampled.
            False for every chunk of a prefill but the last.
    """

    request: Request
    num_computed_tokens: int
    num_tokens: int
    samples: bool


@dataclasses.dataclass(slots=True)
class SchedulerOutput:
    """One step. Decodes come first, then prefills, so that a uniform decode batch is a prefix.

    Attributes:
        step: Counts up from 0.
        scheduled: Requests of this step, in batch order.
        num_tokens: Sum of ``num_tokens`` over ``scheduled``.
        dropped_request_ids: Requests that left the batch since the previous output (finished, aborted or
            preempted): the runner forgets their rows before it reads ``scheduled``.
    """

    step: int
    scheduled: list[ScheduledRequest]
    num_tokens: int
    dropped_request_ids: list[str] = dataclasses.field(default_factory=list)

    @property
    def num_reqs(self) -> int:
        """Requests in this step."""
        return len(self.scheduled)


@dataclasses.dataclass(slots=True)
class RequestUpdate:
    """What one step added to one request. Filled by ``Scheduler.update``.

    Attributes:
        request: The request, its ``token_ids`` already extended.
        token_ids: The new tokens; one today.
        sample_index: Index into the step's sampled tokens (and its logprobs), where results of requests that
            have ended meanwhile leave gaps.
        finish_reason: STOP or LENGTH if the request ended with these tokens, else None.
        stop_reason: The stop token id that ended it, or None (EOS, length).
    """

    request: Request
    token_ids: list[int]
    sample_index: int
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot for metrics and routing.

    Attributes:
        num_running: Requests that hold KV blocks and are in the batch.
        num_waiting: Requests in the queue, preempted ones included.
        num_free_blocks: KV blocks that no request holds; their cached content can be evicted.
        num_total_blocks: KV blocks that requests can hold.
        num_outstanding_tokens: Known tokens of live requests whose KV is still to be computed: the prefill
            work that is already owed.
        num_tokens_to_generate: Most tokens that live requests may still sample, by their ``max_tokens``.
        token_budget_left: Tokens of ``max_num_batched_tokens`` that the last step left unused.
        num_cached_blocks: KV blocks, held or free, whose content can be found by hash.
        num_prefix_query_tokens: Tokens looked up in the prefix cache since the start.
        num_prefix_hit_tokens: Tokens found there.
        num_preemptions: Times that a running request lost its blocks, since the start.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_total_blocks: int
    num_outstanding_tokens: int
    num_tokens_to_generate: int
    token_budget_left: int
    num_cached_blocks: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    num_preemptions: int
