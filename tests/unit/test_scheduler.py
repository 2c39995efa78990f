"""Each rule of the scheduler on its own, step by step."""

from __future__ import annotations

import dataclasses

import pytest

from workers.errors import ConfigError, InvalidRequestError, PromptTooLongError
from workers.outputs import FinishReason
from workers.request import Request, RequestStatus, token_array
from workers.sampling_params import SamplingParams
from workers.scheduler.output import RequestUpdate, SchedulerOutput
from workers.scheduler.scheduler import Scheduler, SchedulerConfig

EOS_ID = 2


def make_scheduler(
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    block_size: int = 4,
    num_usable_blocks: int = 64,
    max_model_len: int = 128,
    enable_prefix_caching: bool = True,
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            num_blocks=num_usable_blocks + 1,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
        )
    )


def make_request(
    request_id: str,
    prompt: int | list[int] = 4,
    *,
    max_tokens: int = 16,
    min_tokens: int = 0,
    stop_token_ids: list[int] | None = None,
    resumed: list[int] | None = None,
) -> Request:
    """A request; a number as the prompt means that many tokens that no other request has."""
    token_ids = [1000 + ord(request_id[0]) * 100 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stop_token_ids)
    return Request(
        request_id,
        token_array([*token_ids, *(resumed or [])]),
        len(token_ids),
        params,
        max_tokens,
        eos_token_ids=frozenset({EOS_ID}),
    )


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add(request)


def schedule(scheduler: Scheduler) -> SchedulerOutput:
    output = scheduler.schedule()
    assert output is not None
    return output


def update(scheduler: Scheduler, output: SchedulerOutput, token_id: int = 50) -> list[RequestUpdate]:
    """Bring results in which every sample is ``token_id``."""
    updates = scheduler.update(output, [token_id] * sum(item.samples for item in output.scheduled))
    scheduler.check_integrity()
    return updates


def step(scheduler: Scheduler, token_id: int = 50) -> list[tuple[str, int, bool]]:
    """One step without overlap; its batch as (id, tokens, samples)."""
    output = schedule(scheduler)
    update(scheduler, output, token_id)
    return batch(output)


def batch(output: SchedulerOutput) -> list[tuple[str, int, bool]]:
    return [(item.request.request_id, item.num_tokens, item.samples) for item in output.scheduled]


# Continuous batching.


def test_a_request_is_prefilled_then_decoded() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 5, max_tokens=3)
    add(scheduler, request)
    assert step(scheduler) == [("a", 5, True)]
    assert step(scheduler) == [("a", 1, True)]
    output = schedule(scheduler)
    assert output.scheduled[0].num_computed_tokens == 6
    (last,) = update(scheduler, output, 51)
    assert (last.request, last.token_ids, last.finish_reason) == (request, [51], FinishReason.LENGTH)
    assert request.output_token_ids == [50, 50, 51]
    assert not scheduler.has_unfinished
    assert scheduler.schedule() is None


def test_decodes_come_before_prefills_and_new_requests_join_running_ones() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, make_request("a", 4))
    step(scheduler)
    add(scheduler, make_request("b", 20), make_request("c", 3))
    assert step(scheduler) == [("a", 1, True), ("b", 7, False)]
    assert step(scheduler) == [("a", 1, True), ("b", 7, False)]
    assert step(scheduler) == [("a", 1, True), ("b", 6, True), ("c", 1, False)]
    assert step(scheduler) == [("a", 1, True), ("b", 1, True), ("c", 2, True)]


def test_a_last_prompt_token_alone_counts_as_a_decode() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    add(scheduler, make_request("a", 7), make_request("b", 9))
    step(scheduler)
    assert step(scheduler) == [("a", 1, True), ("b", 5, False)]


def test_waiting_requests_start_in_order_and_do_not_overtake() -> None:
    scheduler = make_scheduler(num_usable_blocks=8, enable_prefix_caching=False)
    add(scheduler, make_request("a", 20, max_tokens=4), make_request("b", 20, max_tokens=4), make_request("c", 1))
    assert step(scheduler) == [("a", 20, True)]
    assert step(scheduler) == [("a", 1, True)]
    assert scheduler.num_waiting == 2


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, *(make_request(name, max_tokens=2) for name in "abc"))
    assert [name for name, _, _ in step(scheduler)] == ["a", "b"]
    step(scheduler)
    assert [name for name, _, _ in step(scheduler)] == ["c"]


def test_no_more_run_than_the_budget_has_tokens() -> None:
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=2)
    add(scheduler, *(make_request(name, 1, max_tokens=3) for name in "abc"))
    assert [step(scheduler) for _ in range(3)] == [[("a", 1, True), ("b", 1, True)]] * 3
    assert step(scheduler) == [("c", 1, True)]


def test_output_describes_the_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 5), make_request("b", 6))
    first = schedule(scheduler)
    assert (first.step, first.num_tokens, first.num_reqs) == (0, 11, 2)
    update(scheduler, first)
    second = schedule(scheduler)
    assert (second.step, second.num_tokens, second.dropped_request_ids) == (1, 2, [])


def test_a_resumed_request_goes_on_behind_its_output() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4, max_tokens=4, resumed=[50, 51])
    add(scheduler, request)
    assert step(scheduler) == [("a", 6, True)]
    (last,) = update(scheduler, schedule(scheduler))
    assert last.finish_reason is FinishReason.LENGTH
    assert request.output_token_ids == [50, 51, 50, 50]


# Refusals.


@pytest.mark.parametrize(
    ("request_", "error", "message", "param"),
    [
        (make_request("a", []), InvalidRequestError, "prompt is empty", "prompt"),
        (make_request("a", 128), PromptTooLongError, "max_model_len is 128", "prompt"),
        (make_request("a", 4, max_tokens=38), InvalidRequestError, "41 tokens of KV cache.*holds 40", "max_tokens"),
        (make_request("a", 4, max_tokens=1, resumed=[5]), InvalidRequestError, "raise max_tokens", "max_tokens"),
    ],
)
def test_what_can_never_run_is_refused(
    request_: Request, error: type[InvalidRequestError], message: str, param: str
) -> None:
    scheduler = make_scheduler(num_usable_blocks=10)
    with pytest.raises(error, match=message) as info:
        scheduler.add(request_)
    assert info.value.param == param
    assert not scheduler.has_unfinished


def test_a_live_request_id_is_refused() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a"))
    with pytest.raises(InvalidRequestError, match="in use"):
        scheduler.add(make_request("a"))


def test_the_largest_request_that_fits_runs_to_its_end() -> None:
    scheduler = make_scheduler(num_usable_blocks=10, block_size=4)
    request = make_request("a", 4, max_tokens=37)
    add(scheduler, request)
    while scheduler.has_unfinished:
        step(scheduler)
    assert request.num_output_tokens == 37
    assert request.num_preemptions == 0


@pytest.mark.parametrize(
    "field", ["max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks", "max_model_len"]
)
def test_limits_too_small_are_named(field: str) -> None:
    smallest = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=1, block_size=1, num_blocks=2, max_model_len=2)
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(smallest, **{field: getattr(smallest, field) - 1})


# Ends.


def test_eos_ends_a_request_without_a_stop_reason() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", stop_token_ids=[EOS_ID]))
    (last,) = update(scheduler, schedule(scheduler), EOS_ID)
    assert (last.finish_reason, last.stop_reason, last.token_ids) == (FinishReason.STOP, None, [EOS_ID])
    assert last.request.finish_reason is FinishReason.STOP


def test_a_stop_token_names_itself() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", stop_token_ids=[7]))
    (last,) = update(scheduler, schedule(scheduler), 7)
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, 7)
    assert last.request.stop_reason == 7


@pytest.mark.parametrize("token_id", [EOS_ID, 7])
def test_nothing_stops_a_request_before_min_tokens(token_id: int) -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", min_tokens=3, stop_token_ids=[7]))
    reasons = [update(scheduler, schedule(scheduler), token_id)[0].finish_reason for _ in range(3)]
    assert reasons == [None, None, FinishReason.STOP]


def test_a_stop_at_the_length_limit_is_a_stop() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", max_tokens=1))
    (last,) = update(scheduler, schedule(scheduler), EOS_ID)
    assert last.finish_reason is FinishReason.STOP


def test_the_models_context_ends_a_request() -> None:
    scheduler = make_scheduler(max_model_len=8)
    request = make_request("a", 5, max_tokens=100)
    add(scheduler, request)
    while scheduler.has_unfinished:
        step(scheduler)
    assert request.num_tokens == 8
    assert request.finish_reason is FinishReason.LENGTH


def test_a_stop_string_ends_a_request_from_outside() -> None:
    scheduler = make_scheduler()
    request = make_request("a")
    add(scheduler, request)
    step(scheduler)
    scheduler.finish(request, FinishReason.STOP, "###")
    assert (request.is_finished, request.stop_reason, request.block_ids) == (True, "###", [])
    assert not scheduler.has_unfinished
    scheduler.check_integrity()


def test_a_request_ends_once() -> None:
    scheduler = make_scheduler()
    request = make_request("a")
    add(scheduler, request)
    scheduler.finish(request, FinishReason.STOP)
    with pytest.raises(AssertionError, match="not live"):
        scheduler.finish(request, FinishReason.STOP)


def test_abort_reaches_requests_wherever_they_are() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting, kept = make_request("a"), make_request("b"), make_request("c")
    add(scheduler, running, waiting, kept)
    step(scheduler)
    assert scheduler.abort(["a", "nobody", "b"]) == [running, waiting]
    assert running.finish_reason is FinishReason.ABORT
    scheduler.check_integrity()
    output = schedule(scheduler)
    assert batch(output) == [("c", 4, True)]
    assert output.dropped_request_ids == ["a"]


def test_ended_requests_are_dropped_once_from_the_runner() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", max_tokens=1), make_request("b"))
    step(scheduler)
    second = schedule(scheduler)
    assert second.dropped_request_ids == ["a"]
    update(scheduler, second)
    assert schedule(scheduler).dropped_request_ids == []


# Preemption.


def preempt(*, enable_prefix_caching: bool = True) -> tuple[Scheduler, Request, Request]:
    """Two requests in a pool for 5 blocks of 4, run until the earlier one takes a block from the later one."""
    scheduler = make_scheduler(num_usable_blocks=5, enable_prefix_caching=enable_prefix_caching)
    first, second = make_request("a", 5, max_tokens=8), make_request("b", 8, max_tokens=8)
    add(scheduler, first, second)
    for _ in range(4):
        assert [name for name, _, _ in step(scheduler)] == ["a", "b"]
    output = schedule(scheduler)
    assert batch(output) == [("a", 1, True)]
    assert output.dropped_request_ids == ["b"]
    update(scheduler, output)
    return scheduler, first, second


def preempt_overlapped() -> tuple[Scheduler, Request, SchedulerOutput, SchedulerOutput]:
    """The request that is preempted, the step in flight that samples for it, and the step that preempts it."""
    scheduler = make_scheduler(num_usable_blocks=5)
    first, second = make_request("a", 7, max_tokens=8), make_request("b", 7, max_tokens=8)
    add(scheduler, first, second)
    step(scheduler)
    in_flight, preempting = schedule(scheduler), schedule(scheduler)
    assert batch(in_flight) == [("a", 1, True), ("b", 1, True)]
    assert batch(preempting) == [("a", 1, True)]
    assert preempting.dropped_request_ids == ["b"]
    return scheduler, second, in_flight, preempting


def test_the_latest_arrival_is_preempted_and_keeps_its_tokens() -> None:
    _, first, second = preempt()
    assert first.status is RequestStatus.RUNNING
    assert second.status is RequestStatus.PREEMPTED
    assert (second.num_output_tokens, second.num_computed_tokens, second.block_ids) == (4, 0, [])
    assert second.num_preemptions == 1


def test_a_preempted_request_goes_before_those_that_wait() -> None:
    scheduler = make_scheduler(num_usable_blocks=5, max_num_seqs=2)
    first, second = make_request("a", 7, max_tokens=8), make_request("b", 7, max_tokens=8)
    add(scheduler, first, second, make_request("c", 1))
    while second.num_preemptions == 0:
        step(scheduler)
    assert scheduler.num_waiting == 2
    while not first.is_finished:
        assert step(scheduler) == [("a", 1, True)]
    assert [name for name, _, _ in step(scheduler)] == ["b", "c"]


@pytest.mark.parametrize(("enable_prefix_caching", "num_recomputed"), [(True, 4), (False, 12)])
def test_recomputation_takes_what_is_still_cached(enable_prefix_caching: bool, num_recomputed: int) -> None:
    scheduler, first, _ = preempt(enable_prefix_caching=enable_prefix_caching)
    while not first.is_finished:
        step(scheduler)
    assert step(scheduler) == [("b", num_recomputed, True)]
    stats = scheduler.stats()
    assert (stats.num_preemptions, stats.num_prefix_hit_tokens) == (1, 0)


def test_a_request_may_have_to_preempt_itself() -> None:
    scheduler = make_scheduler(num_usable_blocks=5)
    first, second = make_request("a", 7, max_tokens=8), make_request("b", 7, max_tokens=8)
    add(scheduler, first, second)
    step(scheduler)
    step(scheduler)
    assert step(scheduler) == [("a", 1, True)]
    assert second.status is RequestStatus.PREEMPTED
    assert first.status is RequestStatus.RUNNING


def test_admission_leaves_running_requests_room_to_grow() -> None:
    scheduler = make_scheduler(num_usable_blocks=4)
    add(scheduler, make_request("a", 8, max_tokens=3), make_request("b", 5, max_tokens=3))
    assert step(scheduler) == [("a", 8, True)]
    assert step(scheduler) == [("a", 1, True)]
    assert scheduler.stats().num_preemptions == 0


def test_requests_that_cannot_grow_need_no_room() -> None:
    scheduler = make_scheduler(num_usable_blocks=4)
    add(scheduler, make_request("a", 7, max_tokens=2), make_request("b", 5, max_tokens=3))
    assert step(scheduler) == [("a", 7, True), ("b", 5, True)]


def test_many_requests_through_a_pool_for_one() -> None:
    scheduler = make_scheduler(num_usable_blocks=3)
    requests = [make_request(name, 5, max_tokens=8) for name in "abcdef"]
    add(scheduler, *requests)
    for _ in range(200):
        if scheduler.has_unfinished:
            step(scheduler)
    assert [request.num_output_tokens for request in requests] == [8] * 6
    assert scheduler.block_pool.num_free_blocks == 3


# The prefix cache.


def test_a_later_request_reuses_a_computed_prefix() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", list(range(10, 20))))
    step(scheduler)
    second = make_request("b", [*range(10, 18), 90, 91])
    add(scheduler, second)
    assert step(scheduler) == [("a", 1, True), ("b", 2, True)]
    assert second.num_cached_tokens == 8
    stats = scheduler.stats()
    assert (stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens) == (20, 8)


def test_nothing_is_reused_before_it_is_computed() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", list(range(10, 20))))
    in_flight = schedule(scheduler)
    second = make_request("b", list(range(10, 20)))
    add(scheduler, second)
    assert batch(schedule(scheduler)) == [("a", 1, True), ("b", 10, True)]
    update(scheduler, in_flight)
    assert second.num_cached_tokens == 0


def test_generated_blocks_are_reused_too() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [10, 11, 12], max_tokens=6))
    while scheduler.has_unfinished:
        step(scheduler)
    second = make_request("b", [10, 11, 12, 50, 50, 50, 50, 50, 99])
    add(scheduler, second)
    assert step(scheduler) == [("b", 1, True)]
    assert second.num_cached_tokens == 8


def test_cached_tokens_of_a_resumed_request_count_its_prompt_only() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", list(range(10, 22))))
    step(scheduler)
    second = make_request("b", list(range(10, 15)), resumed=list(range(15, 20)))
    add(scheduler, second)
    step(scheduler)
    assert second.num_cached_tokens == 5


# Overlapped steps.


def test_decodes_go_on_while_their_tokens_are_in_flight() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4, max_tokens=3)
    add(scheduler, request)
    first, second, third = schedule(scheduler), schedule(scheduler), schedule(scheduler)
    assert [output.scheduled[0].num_computed_tokens for output in (first, second, third)] == [0, 4, 5]
    assert request.num_placeholders == 3
    # Three samples in flight are all it may have.
    assert scheduler.schedule() is None
    reasons = [update(scheduler, output)[0].finish_reason for output in (first, second, third)]
    assert reasons == [None, None, FinishReason.LENGTH]
    assert request.num_placeholders == 0


def test_a_token_behind_the_end_is_discarded() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4)
    add(scheduler, request, make_request("b", 4))
    first, second = schedule(scheduler), schedule(scheduler)
    updates = scheduler.update(first, [EOS_ID, 50])
    assert [u.finish_reason for u in updates] == [FinishReason.STOP, None]
    scheduler.check_integrity()
    (kept,) = scheduler.update(second, [60, 61])
    assert (kept.request.request_id, kept.token_ids, kept.sample_index) == ("b", [61], 1)
    assert request.output_token_ids == [EOS_ID]
    third = schedule(scheduler)
    assert third.dropped_request_ids == ["a"]


def test_blocks_freed_under_a_step_in_flight_go_to_a_later_step() -> None:
    scheduler = make_scheduler(num_usable_blocks=2)
    first_request = make_request("a", 4, max_tokens=5)
    add(scheduler, first_request)
    first, second = schedule(scheduler), schedule(scheduler)
    blocks = list(first_request.block_ids)
    # The second step still writes position 4 when the first turns out to be the last.
    update(scheduler, first, EOS_ID)
    second_request = make_request("b", 4, max_tokens=5)
    add(scheduler, second_request)
    third = schedule(scheduler)
    assert third.step > second.step
    assert set(second_request.block_ids) <= set(blocks)
    update(scheduler, second)
    update(scheduler, third)
    # What the second step wrote never became findable: only the first prompt and the second one are.
    assert scheduler.block_pool.num_cached_blocks == 2 - (second_request.block_ids[0] == blocks[0])


def test_an_aborted_request_discards_its_token_in_flight() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a"), make_request("b"))
    output = schedule(scheduler)
    scheduler.abort(["a"])
    assert [(u.request.request_id, u.sample_index) for u in update(scheduler, output)] == [("b", 1)]


def test_an_id_may_return_while_its_former_step_is_in_flight() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a"))
    first = schedule(scheduler)
    scheduler.abort(["a"])
    successor = make_request("a", 6)
    add(scheduler, successor)
    second = schedule(scheduler)
    assert second.dropped_request_ids == ["a"]
    assert update(scheduler, first) == []
    (only,) = update(scheduler, second)
    assert only.request is successor
    assert successor.num_output_tokens == 1


def test_a_token_in_flight_survives_preemption() -> None:
    scheduler, second, in_flight, _ = preempt_overlapped()
    assert second.num_placeholders == 1
    updates = update(scheduler, in_flight, 61)
    assert [u.request.request_id for u in updates] == ["a", "b"]
    assert second.output_token_ids == [50, 61]
    assert (second.status, second.num_placeholders) == (RequestStatus.PREEMPTED, 0)


def test_a_request_may_end_while_preempted() -> None:
    scheduler, _, in_flight, _ = preempt_overlapped()
    updates = scheduler.update(in_flight, [50, EOS_ID])
    assert updates[1].finish_reason is FinishReason.STOP
    assert scheduler.num_waiting == 0
    scheduler.check_integrity()


def test_a_preempted_request_waits_for_its_steps_in_flight() -> None:
    scheduler, second, in_flight, preempting = preempt_overlapped()
    scheduler.abort(["a"])
    # There is room now, but a token is not back.
    assert scheduler.schedule() is None
    update(scheduler, in_flight, 61)
    assert batch(schedule(scheduler)) == [("b", 5, True)]
    assert update(scheduler, preempting) == []
    assert second.output_token_ids == [50, 61]


def test_a_chunk_in_flight_does_not_vouch_for_the_blocks_of_a_later_life() -> None:
    scheduler = make_scheduler(num_usable_blocks=6, max_num_batched_tokens=2)
    first, second = make_request("a", 1, max_tokens=20), make_request("b", 14, max_tokens=8)
    add(scheduler, first, second)
    outputs = []
    while second.num_preemptions == 0:
        outputs.append(schedule(scheduler))
    # Prefill of a first block was in flight when that block was lost.
    assert sum(item.num_tokens for o in outputs for item in o.scheduled if item.request is second) > 4
    scheduler.abort(["a"])
    for output in outputs[:-1]:
        assert scheduler.schedule() is None
        update(scheduler, output)
    again = schedule(scheduler)
    assert batch(again) == [("b", 2, False)]
    assert again.scheduled[0].num_computed_tokens == 0
    assert scheduler.block_pool.num_cached_blocks == 0


# Contract and figures.


def test_results_come_in_order() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a"))
    schedule(scheduler)
    second = schedule(scheduler)
    with pytest.raises(AssertionError, match="came before"):
        scheduler.update(second, [1])


@pytest.mark.parametrize("sampled", [[], [1, 2]])
def test_every_sample_has_a_token(sampled: list[int]) -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a"))
    with pytest.raises((AssertionError, IndexError)):
        scheduler.update(schedule(scheduler), sampled)


def test_stats_add_up() -> None:
    scheduler = make_scheduler(num_usable_blocks=16, max_num_batched_tokens=8, max_num_seqs=2)
    add(scheduler, make_request("a", 5), make_request("b", 9), make_request("c", 7))
    update(scheduler, schedule(scheduler))
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.num_total_blocks, stats.num_free_blocks) == (16, 16 - 2 - 3)
    # One sampled token of a, six prompt tokens of b, all of c.
    assert stats.num_outstanding_tokens == 1 + 6 + 7
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_live_requests_are_found_by_id() -> None:
    scheduler = make_scheduler()
    request = make_request("a")
    add(scheduler, request)
    assert scheduler.get("a") is request
    scheduler.abort(["a"])
    assert scheduler.get("a") is None
