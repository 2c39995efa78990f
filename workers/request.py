"""One request as the engine sees it: token ids, progress and the KV blocks it holds.

Pure bookkeeping. The scheduler is the only writer of everything here, except that the output processor may
ask the scheduler to finish a request. Knows nothing about tensors, text or transport.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from array import array
from collections.abc import Sequence

from workers.outputs import FinishReason
from workers.sampling_params import SamplingParams


class RequestStatus(enum.IntEnum):
    """Where a request stands. PREEMPTED requests wait at the head of the queue and are recomputed."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED = 3


def token_array(token_ids: Sequence[int]) -> array[int]:
    """Token ids as uint32: a list that numpy and hashes read in place, without a look at each number.

    Raises:
        struct.error: One of them is no integer, or out of range.
        TypeError: One of them can be an index, but is not: an array of several numbers.
    """
    # The array's own constructor takes three times as long.
    return array("I", struct.pack(f"{len(token_ids)}I", *token_ids))


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """One prompt being completed (``params.n`` is always 1 here; fan-out happens above the engine).

    Attributes:
        request_id: Unique among live requests of an engine.
        token_ids: Prompt followed by every sampled token that is known on the host; see :func:`token_array`.
        num_prompt_tokens: Length of the prompt within ``token_ids``. Tokens given to continue from (a stream
            resumed after its replica died) count as output, so penalties and seeds go on where they stopped.
        params: Sampling parameters, with ``n == 1``.
        max_tokens: Most output tokens, resolved against the model's context. Counts resumed tokens too.
        eos_token_ids: The model's end-of-sequence ids; empty when ``params.ignore_eos``.
        arrival_time_s: ``time.monotonic()`` at arrival.
        seed: Keys the request's random numbers: its own, or one the engine gave it.
        num_computed_tokens: Leading tokens whose KV is in the cache, or will be once the steps already
            scheduled have run. Written by the scheduler at schedule time.
        num_placeholders: Tokens sampled by steps that were scheduled but whose results are not back yet.
        block_ids: Physical KV blocks, in order of position.
        block_hashes: Chained hash per full block of ``token_ids``, computed lazily by the block pool.
        num_cached_tokens: Prompt tokens found in the prefix cache when first scheduled, or None before that.
        num_preemptions: How often the request lost its blocks.
        max_num_tokens: Length at which the request ends: prompt plus ``max_tokens``, within the model's
            context. Written by ``Scheduler.add``.
        resume_after_step: A preempted request waits until the results of this step are back. Written at
            preemption.
    """

    request_id: str
    token_ids: array[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    arrival_time_s: float = 0.0
    seed: int = 0
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_placeholders: int = 0
    block_ids: list[int] = dataclasses.field(default_factory=list)
    block_hashes: list[bytes] = dataclasses.field(default_factory=list)
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    max_num_tokens: int = 0
    resume_after_step: int = -1
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known on the host."""
        return len(self.token_ids)

    @property
    def num_tokens_in_flight(self) -> int:
        """Tokens known on the host plus those still being sampled."""
        return len(self.token_ids) + self.num_placeholders

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens known on the host."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the generated tokens known on the host."""
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def is_finished(self) -> bool:
        """Whether no further token will be produced."""
        return self.status is RequestStatus.FINISHED
