"""Continuous batching: which requests compute which tokens in the next step.

Knows requests, blocks and the token budget. Knows nothing about tensors or text, and is called by one thread.

Policy. Every step has a budget of ``max_num_batched_tokens``. Running decodes come first, one token each;
then prefills in flight, as many tokens as the budget leaves; then waiting requests, first come first served.
Nobody is admitted before all who run have got a token, so decodes never exceed the budget, and every decode
is in every step. A request gets the blocks of all its known tokens when it is admitted, so only decodes ask
for more; when none is left, the latest arrival among the running is preempted: it loses its blocks, keeps its
tokens, goes to the head of the queue and is recomputed later, from the prefix cache where that still has its
blocks. ``running`` followed by ``waiting`` is always in order of arrival (a request that ``goes_first``
arrives before all that wait). The earliest request could be
preempted only by itself, which ``add`` rules out by refusing what exceeds the pool; so it advances, and the
rest follows: no deadlock, no livelock.

Overlapped steps. ``schedule`` may be called again before ``update`` has brought the results of earlier steps.
Progress is written at schedule time (``num_computed_tokens``), samples still in flight are counted
(``num_placeholders``), and a request that will certainly reach its length with them is not scheduled again.
The device runs steps in the order in which they were scheduled, and the runner takes everything it needs from
the requests before the scheduler is called again. From this follows that

- blocks may be freed while a step in flight still reads or writes them (its request ended, or was preempted):
  whoever gets them next computes in a later step, and reads only what that or a still later step wrote;
- such a late write never spoils a cached block: a hash is registered only when ``update`` says that all of
  the block has been computed, and a request writes only behind what it has computed;
- a token sampled for a request that has ended meanwhile is discarded;
- a token sampled for a request that was preempted meanwhile is kept: it was computed before the blocks were
  lost. The request is not admitted again before the steps in flight at its preemption are back, so that all
  its tokens are then known on the host, and a result never meets a later life of its request.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from workers.errors import ConfigError, InvalidRequestError, PromptTooLongError
from workers.outputs import FinishReason
from workers.request import Request, RequestStatus
from workers.scheduler.block_pool import BlockPool
from workers.scheduler.output import RequestUpdate, ScheduledRequest, SchedulerOutput, SchedulerStats

# Bound once: an attribute lookup on the enumeration costs as much as the comparison, for every token.
_RUNNING = RequestStatus.RUNNING
_FINISHED = RequestStatus.FINISHED


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one scheduler; names and meaning are those of ``EngineConfig``.

    Attributes:
        num_blocks: Physical KV blocks, the null block (see ``block_pool.py``) included.

    Raises:
        ConfigError: A limit is too small to serve anything.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    max_model_len: int
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        smallest = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "block_size": 1, "num_blocks": 2}
        for name, least in (*smallest.items(), ("max_model_len", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.", param=name)


class Scheduler:
    """Holds every live request of an engine, and is the only writer of their bookkeeping."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.block_pool = BlockPool(
            config.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._in_flight: deque[SchedulerOutput] = deque()
        self._dropped: list[str] = []
        self._next_step = 0
        self._num_preemptions = 0
        self._budget_left = config.max_num_batched_tokens

    # Requests come and go.

    def add(self, request: Request, *, goes_first: bool = False) -> None:
        """Queue a request; it may bring output tokens to continue from.

        Args:
            request: A new one.
            goes_first: Queue it ahead of all that wait, as if it had arrived before them.

        Raises:
            InvalidRequestError: It can never run; the message says what to change.
        """
        self._check(request)
        request.max_num_tokens = self._max_num_tokens(request)
        request.status = RequestStatus.WAITING
        self._requests[request.request_id] = request
        self._waiting[request.request_id] = request
        if goes_first:
            self._waiting.move_to_end(request.request_id, last=False)

    def abort(self, request_ids: Iterable[str]) -> list[Request]:
        """End requests that nobody waits for any more, and return them.

        Ids that are not live are passed over: the request may have finished on its own just before.
        """
        aborted = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        for request in aborted:
            self.finish(request, FinishReason.ABORT)
        return aborted

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a live request now; what steps in flight still sample for it is discarded."""
        assert self._requests.get(request.request_id) is request, f"{request.request_id} is not live"
        if request.status is _RUNNING:
            self._running.remove(request)
            self._dropped.append(request.request_id)
        else:
            del self._waiting[request.request_id]
        del self._requests[request.request_id]
        self.block_pool.free(request)
        request.status = _FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        request.num_placeholders = 0

    # A step.

    def schedule(self) -> SchedulerOutput | None:
        """Decide the next step.

        Returns:
            None if nothing can be computed now: there are no requests, or all wait for results of steps in
            flight. The runner takes what it needs from the requests before any other call to the scheduler.
        """
        scheduled, prefills = self._schedule_decodes()
        budget = self.config.max_num_batched_tokens - len(scheduled)
        for request in prefills:
            budget = self._schedule_chunk(request, budget, scheduled)
        budget = self._admit_waiting(budget, scheduled)
        if not scheduled:
            assert self._in_flight or not self._requests, "deadlock: live requests, but no step to wait for"
            return None
        output = SchedulerOutput(
            step=self._next_step,
            scheduled=scheduled,
            num_tokens=self.config.max_num_batched_tokens - budget,
            dropped_request_ids=self._dropped,
        )
        self._dropped = []
        self._budget_left = budget
        self._next_step += 1
        self._in_flight.append(output)
        return output

    def name_blocks(self, output: SchedulerOutput) -> None:
        """Hash the blocks that the prefills of a step fill: a part of ``update`` that can be done while the step runs.

        Called, if at all, before any other call to the scheduler.
        """
        if output.num_tokens == output.num_reqs:
            return
        for item in output.scheduled:
            if item.num_tokens > 1:
                end = item.num_computed_tokens + item.num_tokens
                self.block_pool.name_blocks(item.request, end // self.config.block_size)

    def update(self, output: SchedulerOutput, sampled: Sequence[int]) -> list[RequestUpdate]:
        """Bring the results of the oldest step in flight.

        Args:
            output: What ``schedule`` returned.
            sampled: A token per scheduled request with ``samples``, in order.

        Returns:
            One update per sampled request that is still live.
        """
        oldest = self._in_flight.popleft()
        assert oldest is output, f"results of step {output.step} came before those of step {oldest.step}"
        updates: list[RequestUpdate] = []
        sample_index = 0
        block_size = self.config.block_size
        for item in output.scheduled:
            request = item.request
            status = request.status
            # Before the new token, which may end the request and free its blocks.
            if item.num_computed_tokens % block_size + item.num_tokens >= block_size and status is _RUNNING:
                self._register_full_blocks(item)
            if item.samples:
                if status is not _FINISHED:
                    updates.append(self._append_token(request, sampled[sample_index], sample_index))
                sample_index += 1
        assert sample_index == len(sampled), f"{len(sampled)} tokens for {sample_index} samples"
        return updates

    # State.

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is live; steps in flight may outlive the last one."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def num_steps_in_flight(self) -> int:
        """Steps scheduled whose results are not back."""
        return len(self._in_flight)

    def get(self, request_id: str) -> Request | None:
        """The live request of that id."""
        return self._requests.get(request_id)

    def stats(self) -> SchedulerStats:
        """A snapshot; takes time linear in the live requests."""
        pool = self.block_pool
        live = self._requests.values()
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_blocks=pool.num_free_blocks,
            num_total_blocks=pool.num_usable_blocks,
            num_outstanding_tokens=sum(r.num_tokens_in_flight - r.num_computed_tokens for r in live),
            num_tokens_to_generate=sum(r.max_num_tokens - len(r.token_ids) for r in live),
            token_budget_left=self._budget_left if live else self.config.max_num_batched_tokens,
            num_cached_blocks=pool.num_cached_blocks,
            num_prefix_query_tokens=pool.num_query_tokens,
            num_prefix_hit_tokens=pool.num_hit_tokens,
            num_preemptions=self._num_preemptions,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is accounted for; cheap enough for every idle moment."""
        self.block_pool.check_integrity(self._requests.values())

    # How add() judges.

    def _max_num_tokens(self, request: Request) -> int:
        return min(request.num_prompt_tokens + request.max_tokens, self.config.max_model_len)

    def _check(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise InvalidRequestError(
                f"Request id {request.request_id!r} is in use; choose another.", param="request_id"
            )
        if request.num_prompt_tokens < 1:
            raise InvalidRequestError("The prompt is empty; give at least one token.", param="prompt")
        assert request.num_prompt_tokens <= request.num_tokens
        assert request.params.n == 1
        assert request.max_tokens >= 1
        self._check_length(request)

    def _check_length(self, request: Request) -> None:
        if request.num_prompt_tokens >= self.config.max_model_len:
            raise PromptTooLongError(
                f"The prompt has {request.num_prompt_tokens} tokens, but max_model_len is "
                f"{self.config.max_model_len} for prompt and output together; shorten the prompt.",
                param="prompt",
            )
        longest = self._max_num_tokens(request)
        if request.num_tokens >= longest:
            raise InvalidRequestError(
                f"The request brings {request.num_output_tokens} output tokens and may have no more than "
                f"{longest - request.num_prompt_tokens}; raise max_tokens or do not resume it.",
                param="max_tokens",
            )
        # The last token is sampled but never computed.
        num_slots = self.block_pool.num_usable_blocks * self.config.block_size
        if longest - 1 > num_slots:
            raise InvalidRequestError(
                f"Prompt and output can take {longest - 1} tokens of KV cache, which holds {num_slots}: "
                "shorten the prompt, lower max_tokens, or serve with a higher num_gpu_blocks_override.",
                param="max_tokens",
            )

    # Steps of schedule().

    def _schedule_decodes(self) -> tuple[list[ScheduledRequest], list[Request]]:
        """One token for every running request that has one to compute; returns the others as prefills.

        A last prompt token on its own counts as a decode: the runner need not tell them apart.
        """
        scheduled: list[ScheduledRequest] = []
        prefills: list[Request] = []
        block_size = self.config.block_size
        # Preemption pops from the end of this list: never what this loop has been through.
        for request in self._running:
            start = request.num_computed_tokens
            end = start + 1
            if end != len(request.token_ids) + request.num_placeholders:
                prefills.append(request)
                continue
            if end >= request.max_num_tokens:
                continue  # Ends with the tokens in flight.
            if start == len(request.block_ids) * block_size and not self._grow(request):
                break
            request.num_computed_tokens = end
            request.num_placeholders += 1
            scheduled.append(ScheduledRequest(request, start, 1, True))
        return scheduled, prefills

    def _grow(self, request: Request) -> bool:
        """Give a decode its next block, preempting from the latest arrival on; False if that was itself."""
        while self.block_pool.num_free_blocks == 0:
            if self._preempt_latest() is request:
                return False
        self.block_pool.append_block(request)
        return True

    def _preempt_latest(self) -> Request:
        victim = self._running.pop()
        self.block_pool.free(victim)
        victim.status = RequestStatus.PREEMPTED
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        victim.resume_after_step = self._next_step - 1
        self._num_preemptions += 1
        self._waiting[victim.request_id] = victim
        self._waiting.move_to_end(victim.request_id, last=False)
        self._dropped.append(victim.request_id)
        return victim

    def _schedule_chunk(self, request: Request, budget: int, scheduled: list[ScheduledRequest]) -> int:
        """Schedule as much of a prefill as the budget allows; returns what is left of the budget."""
        start = request.num_computed_tokens
        num_tokens = min(request.num_tokens - start, budget)
        if num_tokens == 0:
            return budget
        request.num_computed_tokens = start + num_tokens
        samples = request.num_computed_tokens == request.num_tokens
        request.num_placeholders += samples
        scheduled.append(ScheduledRequest(request, start, num_tokens, samples))
        return budget - num_tokens

    def _admit_waiting(self, budget: int, scheduled: list[ScheduledRequest]) -> int:
        """Start waiting requests, first come first served; returns what is left of the budget."""
        while self._waiting and budget > 0 and len(self._running) < self.config.max_num_seqs:
            request = next(iter(self._waiting.values()))
            if not self._try_admit(request):
                break
            budget = self._schedule_chunk(request, budget, scheduled)
        return budget

    def _try_admit(self, request: Request) -> bool:
        """Move the head of the queue into the batch, with blocks for all its known tokens."""
        if self._in_flight and request.resume_after_step >= self._in_flight[0].step:
            return False
        pool = self.block_pool
        cached_prefix = pool.get_cached_prefix(request)
        if not self._leaves_headroom(pool.num_free_blocks_taken(request, cached_prefix)):
            return False
        pool.allocate_known(request, cached_prefix)
        request.num_computed_tokens = len(cached_prefix) * self.config.block_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        del self._waiting[request.request_id]
        request.status = _RUNNING
        self._running.append(request)
        return True

    def _leaves_headroom(self, num_blocks: int) -> bool:
        """Whether every running request can still grow by a block once ``num_blocks`` have been taken.

        Without this, a request admitted into the last blocks is preempted, its prefill wasted, by the first
        decode that crosses a block boundary.
        """
        num_left = self.block_pool.num_free_blocks - num_blocks
        if num_left >= len(self._running):
            return True
        if num_left < 0:
            return False
        block_size = self.config.block_size
        num_growing = sum(r.max_num_tokens - 1 > len(r.block_ids) * block_size for r in self._running)
        return num_left >= num_growing

    # Steps of update().

    def _register_full_blocks(self, item: ScheduledRequest) -> None:
        start, end = item.num_computed_tokens, item.num_computed_tokens + item.num_tokens
        block_size = self.config.block_size
        self.block_pool.register(item.request, start // block_size, end // block_size)

    def _append_token(self, request: Request, token_id: int, sample_index: int) -> RequestUpdate:
        token_ids = request.token_ids
        token_ids.append(token_id)
        request.num_placeholders -= 1
        update = RequestUpdate(request, [token_id], sample_index)
        is_eos = token_id in request.eos_token_ids
        if (is_eos or token_id in request.params.stop_ids) and _may_stop(request):
            update.finish_reason = FinishReason.STOP
            update.stop_reason = None if is_eos else token_id
            self.finish(request, FinishReason.STOP, update.stop_reason)
        elif len(token_ids) >= request.max_num_tokens:
            update.finish_reason = FinishReason.LENGTH
            self.finish(request, FinishReason.LENGTH)
        return update


def _may_stop(request: Request) -> bool:
    """Whether EOS and stop tokens count yet."""
    return request.num_output_tokens >= request.params.min_tokens
