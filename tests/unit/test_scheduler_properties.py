"""Whatever arrives, leaves or runs out: every request gets the tokens it would get alone.

Random arrivals, aborts, stops and resumptions meet tiny pools and up to three steps in flight: once as a state
machine, whose failures shrink to a few steps, and once as long walks from a seed, which go much further per second.
The runner is a fake with a real cache: it stores a chained value per slot, reads the
whole context back through the block table, and derives the next token from it. A block that is shared wrongly,
reused too early or registered before it is computed therefore shows as a wrong token.
"""

from __future__ import annotations

import collections
import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from workers.errors import InvalidRequestError
from workers.outputs import FinishReason
from workers.request import Request, RequestStatus, token_array
from workers.sampling_params import SamplingParams
from workers.scheduler.block_pool import NULL_BLOCK
from workers.scheduler.output import RequestUpdate, ScheduledRequest, SchedulerOutput
from workers.scheduler.scheduler import Scheduler, SchedulerConfig

VOCAB_SIZE = 16
EOS_ID = 6
STOP_ID = 5
#: Prompts are a shared prefix plus a tail, so that requests meet in the cache.
PREFIXES = ((), (1, 2, 3, 4), (1, 2, 3, 4, 1, 2, 3, 4), (1, 2, 4, 4, 0, 1))


def extend_chain(previous: int, token_id: int) -> int:
    """The fake KV of one position: stands for its token and everything before it."""
    return hash((previous, token_id))


def sample(context: list[int]) -> int:
    """The fake model: the next token after a context of fake KV values."""
    return hash(tuple(context)) % VOCAB_SIZE


def continue_alone(request: Request, max_model_len: int) -> tuple[list[int], FinishReason, int | None]:
    """Output tokens, finish reason and stop reason of the request in an engine of its own."""
    context: list[int] = []
    for token_id in request.token_ids:
        context.append(extend_chain(context[-1] if context else 0, token_id))
    output = request.output_token_ids
    while True:
        token_id = sample(context)
        output.append(token_id)
        if len(output) >= request.params.min_tokens:
            if token_id in request.eos_token_ids:
                return output, FinishReason.STOP, None
            if token_id in request.params.stop_ids:
                return output, FinishReason.STOP, token_id
        if len(output) == request.max_tokens or request.num_prompt_tokens + len(output) == max_model_len:
            return output, FinishReason.LENGTH, None
        context.append(extend_chain(context[-1], token_id))


class FakeRunner:
    """Runs steps in the order of launch, as a device stream does, on a cache of slots."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.kv_cache: dict[int, int] = {}
        #: Rows of the batch: the request, and the position that it must go on from.
        self.rows: dict[str, tuple[Request, int]] = {}
        #: Per row that was sampled: the step that did so last, and the token.
        self.last_sample: dict[str, tuple[int, int]] = {}

    def launch(self, output: SchedulerOutput) -> list[int]:
        self._check_batch(output)
        for request_id in output.dropped_request_ids:
            del self.rows[request_id]
            self.last_sample.pop(request_id, None)
        assert all(request.status is RequestStatus.RUNNING for request, _ in self.rows.values())
        for item in output.scheduled:
            self._advance_row(item)
            self._write(output.step, item)
        return [self._sample(output.step, item) for item in output.scheduled if item.samples]

    def _check_batch(self, output: SchedulerOutput) -> None:
        config = self.scheduler.config
        assert output.num_tokens == sum(item.num_tokens for item in output.scheduled)
        assert 0 < output.num_tokens <= config.max_num_batched_tokens
        assert output.num_reqs <= config.max_num_seqs
        assert len({item.request.request_id for item in output.scheduled}) == output.num_reqs
        written: set[int] = set()
        for item in output.scheduled:
            assert item.request.status is RequestStatus.RUNNING
            assert item.request.num_tokens_in_flight <= item.request.max_num_tokens, "computed for nothing"
            blocks = self._written_blocks(item)
            assert NULL_BLOCK not in blocks
            assert written.isdisjoint(blocks), "two requests write to one block"
            written |= blocks
        is_cached = self.scheduler.block_pool._hash_of
        assert all(is_cached[block_id] is None for block_id in written), "a cached block is written"

    def _advance_row(self, item: ScheduledRequest) -> None:
        request, start = item.request, item.num_computed_tokens
        assert self.rows.get(request.request_id, (request, start)) == (request, start)
        self.rows[request.request_id] = (request, start + item.num_tokens)

    def _written_blocks(self, item: ScheduledRequest) -> set[int]:
        positions = range(item.num_computed_tokens, item.num_computed_tokens + item.num_tokens)
        return {item.request.block_ids[p // self.scheduler.config.block_size] for p in positions}

    def _slot(self, request: Request, position: int) -> int:
        block, offset = divmod(position, self.scheduler.config.block_size)
        return request.block_ids[block] * self.scheduler.config.block_size + offset

    def _token_at(self, step: int, item: ScheduledRequest, position: int) -> int:
        request = item.request
        if position < len(request.token_ids):
            return request.token_ids[position]
        sampled_in, token_id = self.last_sample[request.request_id]
        assert sampled_in == step - 1, "a token in flight comes from the step before"
        assert item.num_tokens == 1
        return token_id

    def _write(self, step: int, item: ScheduledRequest) -> None:
        for position in range(item.num_computed_tokens, item.num_computed_tokens + item.num_tokens):
            previous = self.kv_cache[self._slot(item.request, position - 1)] if position else 0
            token_id = self._token_at(step, item, position)
            self.kv_cache[self._slot(item.request, position)] = extend_chain(previous, token_id)

    def _sample(self, step: int, item: ScheduledRequest) -> int:
        num_context = item.num_computed_tokens + item.num_tokens
        token_id = sample([self.kv_cache[self._slot(item.request, p)] for p in range(num_context)])
        self.last_sample[item.request.request_id] = (step, token_id)
        return token_id


@dataclasses.dataclass
class Expected:
    """A live request and what it should produce."""

    request: Request
    num_output_tokens: int
    tokens: list[int]
    finish_reason: FinishReason
    stop_reason: int | None


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a request asks for; with ``fits`` it is cut to what the pool can hold."""

    prefix: tuple[int, ...]
    tail: list[int]
    max_tokens: int
    min_tokens: int
    uses_eos: bool
    uses_stop_id: bool
    num_resumed: int
    fits: bool


class Simulation:
    """A scheduler, a fake runner and a judge."""

    def __init__(self, config: SchedulerConfig, depth: int) -> None:
        self.scheduler = Scheduler(config)
        self.runner = FakeRunner(self.scheduler)
        self.depth = depth
        self.in_flight: collections.deque[tuple[SchedulerOutput, list[int]]] = collections.deque()
        self.live: dict[str, Expected] = {}
        self.num_added = 0

    def add(self, spec: Spec) -> None:
        request = self._make_request(spec)
        if not self._can_run(request):
            with pytest.raises(InvalidRequestError):
                self.scheduler.add(request)
            return
        self.scheduler.add(request)
        expected = continue_alone(request, self.scheduler.config.max_model_len)
        self.live[request.request_id] = Expected(request, request.num_output_tokens, *expected)

    def _make_request(self, spec: Spec) -> Request:
        prompt, max_tokens = [*spec.prefix, *spec.tail], spec.max_tokens
        if spec.fits:
            prompt = prompt[-self._num_slots :]
            max_tokens = min(max_tokens, self._num_slots + 1 - len(prompt))
        self.num_added += 1
        return Request(
            request_id=str(self.num_added),
            token_ids=token_array([*prompt, *prompt[: spec.num_resumed]]),
            num_prompt_tokens=len(prompt),
            params=SamplingParams(
                max_tokens=max_tokens,
                min_tokens=min(spec.min_tokens, max_tokens),
                stop_token_ids=[STOP_ID] if spec.uses_stop_id else None,
            ),
            max_tokens=max_tokens,
            eos_token_ids=frozenset({EOS_ID} if spec.uses_eos else ()),
        )

    @property
    def _num_slots(self) -> int:
        return (self.scheduler.config.num_blocks - 1) * self.scheduler.config.block_size

    def _can_run(self, request: Request) -> bool:
        max_model_len = self.scheduler.config.max_model_len
        longest = min(request.num_prompt_tokens + request.max_tokens, max_model_len)
        fits = longest - 1 <= self._num_slots
        return fits and request.num_prompt_tokens < max_model_len and request.num_tokens < longest

    def schedule(self) -> None:
        if len(self.in_flight) == self.depth:
            self.update()
        output = self.scheduler.schedule()
        if output is not None:
            self.in_flight.append((output, self.runner.launch(output)))
            if output.step % 2:
                self.scheduler.name_blocks(output)

    def update(self) -> None:
        if self.in_flight:
            for update in self.scheduler.update(*self.in_flight.popleft()):
                self._check_update(update)

    def _check_update(self, update: RequestUpdate) -> None:
        expected = self.live[update.request.request_id]
        assert update.request is expected.request
        for token_id in update.token_ids:
            assert token_id == expected.tokens[expected.num_output_tokens], "not what it gets alone"
            expected.num_output_tokens += 1
        is_last = expected.num_output_tokens == len(expected.tokens)
        assert update.finish_reason == (expected.finish_reason if is_last else None)
        assert update.stop_reason == (expected.stop_reason if is_last else None)
        assert update.request.output_token_ids == expected.tokens[: expected.num_output_tokens]
        if is_last:
            assert update.request.is_finished
            del self.live[update.request.request_id]

    def abort(self, choice: int) -> None:
        if self.live:
            request_id = list(self.live)[choice % len(self.live)]
            aborted = self.scheduler.abort([request_id, "unknown"])
            assert aborted == [self.live.pop(request_id).request]
            assert aborted[0].finish_reason is FinishReason.ABORT

    def stop(self, choice: int) -> None:
        """What the output processor does when it finds a stop string."""
        if self.live:
            request_id = list(self.live)[choice % len(self.live)]
            self.scheduler.finish(self.live.pop(request_id).request, FinishReason.STOP, "stop here")

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        check_free_blocks(scheduler)
        assert scheduler.num_running + scheduler.num_waiting == len(self.live)
        assert scheduler.num_steps_in_flight == len(self.in_flight)
        arrivals = [int(request.request_id) for request in (*scheduler._running, *scheduler._waiting.values())]
        assert arrivals == sorted(arrivals), "out of order of arrival"

    def drain(self) -> None:
        """Run everybody to the end; nobody may wait for ever, and every block must come back."""
        # Every token costs at most one recomputation of a whole context at one token per step.
        bound = 10 + sum(len(e.tokens) * 40 for e in self.live.values())
        while self.scheduler.has_unfinished or self.in_flight:
            self.schedule()
            self.update()
            bound -= 1
            assert bound > 0, "livelock"
        assert not self.live
        self.check()
        assert self.scheduler.block_pool.num_free_blocks == self.scheduler.block_pool.num_usable_blocks


def check_free_blocks(scheduler: Scheduler) -> None:
    """The free lists, block by block: too slow for production, where counts do."""
    pool = scheduler.block_pool
    free = [*pool._free_empty, *pool._free_cached]
    held = {block_id for request in scheduler._requests.values() for block_id in request.block_ids}
    assert sorted([*free, *held, NULL_BLOCK]) == list(range(pool.num_blocks))
    assert all(pool._hash_of[block_id] is None for block_id in pool._free_empty)
    assert all(pool._hash_of[block_id] is not None for block_id in pool._free_cached)
    assert all(pool._hash_of[block_id] == block_hash for block_hash, block_id in pool._block_of.items())


configs = st.builds(
    SchedulerConfig,
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 16),
    block_size=st.integers(1, 4),
    num_blocks=st.integers(4, 13),
    max_model_len=st.sampled_from([12, 40]),
    enable_prefix_caching=st.booleans(),
)
specs = st.builds(
    Spec,
    prefix=st.sampled_from(PREFIXES),
    tail=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    max_tokens=st.integers(1, 20),
    min_tokens=st.integers(0, 4),
    uses_eos=st.booleans(),
    uses_stop_id=st.booleans(),
    num_resumed=st.sampled_from([0, 0, 0, 1, 3]),
    fits=st.sampled_from([True, True, True, False]),
)


class SchedulerMachine(RuleBasedStateMachine):
    """The simulation as rules."""

    @initialize(config=configs, depth=st.integers(1, 3))
    def start(self, config: SchedulerConfig, depth: int) -> None:
        self.simulation = Simulation(config, depth)

    @rule(arrivals=st.lists(specs, min_size=1, max_size=3))
    def add(self, arrivals: list[Spec]) -> None:
        for spec in arrivals:
            self.simulation.add(spec)

    @rule(num_steps=st.integers(1, 20))
    def schedule(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.simulation.schedule()

    @rule()
    def update(self) -> None:
        self.simulation.update()

    @rule(choice=st.integers(0, 7))
    def abort(self, choice: int) -> None:
        self.simulation.abort(choice)

    @rule(choice=st.integers(0, 7))
    def stop(self, choice: int) -> None:
        self.simulation.stop(choice)

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_long_walks(seed: int) -> None:
    rng = random.Random(seed)
    simulation = Simulation(random_config(rng), depth=rng.randint(1, 3))
    for _ in range(200):
        action = rng.random()
        if action < 0.2:
            simulation.add(random_spec(rng))
        elif action < 0.23:
            simulation.abort(rng.randrange(8))
        elif action < 0.26:
            simulation.stop(rng.randrange(8))
        elif action < 0.4:
            simulation.update()
        else:
            simulation.schedule()
        simulation.check()
    simulation.drain()


def random_config(rng: random.Random) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=rng.randint(1, 5),
        max_num_batched_tokens=rng.choice([3, 8, 64]),
        block_size=rng.randint(1, 4),
        num_blocks=rng.randint(6, 16),
        max_model_len=rng.choice([12, 64, 64]),
        enable_prefix_caching=rng.random() < 0.7,
    )


def random_spec(rng: random.Random) -> Spec:
    return Spec(
        prefix=rng.choice(PREFIXES),
        tail=rng.choices(range(5), k=rng.randint(1, 6)),
        max_tokens=rng.randint(1, 40),
        min_tokens=rng.randint(0, 4),
        uses_eos=rng.random() < 0.3,
        uses_stop_id=rng.random() < 0.3,
        num_resumed=rng.choice([0, 0, 0, 1, 3]),
        fits=rng.random() < 0.9,
    )
