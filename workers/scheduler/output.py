"""What the scheduler decided for one step: the message from bookkeeping to the runner."""

from __future__ import annotations

import dataclasses

from workers.request import Request


@dataclasses.dataclass(slots=True)
class ScheduledRequest:
    """One request's share of a step.

    Attributes:
        request: The request; the runner reads ``token_ids`` and ``block_ids`` and changes nothing.
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
