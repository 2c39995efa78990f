"""The gate in front of the replicas: places, order, bounds, what a request leaves behind when it goes away."""

from __future__ import annotations

import asyncio

import pytest

from cluster.config import ReplicaConfig
from cluster.messages import GenerateRequest
from cluster.routing.policies import balanced, round_robin
from cluster.routing.snapshot import ReplicaSnapshot
from cluster.serving.gate import Gate
from tests.fleet_fakes import FakeCluster, until
from tests.replica_states import replica_state
from workers.errors import EngineDeadError, QueueFullError
from workers.outputs import TokenChunk
from workers.sampling_params import SamplingParams


def request(request_id: str, key: str = "", max_tokens: int = 8, weight: float = 1.0) -> GenerateRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return GenerateRequest(request_id, [1, 2, 3], params, key_name=key, weight=weight)


class Place:
    """One replica for two requests, with one more in its own queue."""

    def __init__(self, **config: object) -> None:
        self.running: list[str] = []
        self.is_there = True
        self.num_wakes = 0
        fields = {"engine_backlog": 1, "max_queued_requests": 100, **config}
        self.gate = Gate(self._snapshots, ReplicaConfig.model_validate(fields), self._wake)

    def _snapshots(self) -> list[ReplicaSnapshot]:
        state = replica_state(num_running=len(self.running), max_num_seqs=2)
        return [ReplicaSnapshot("r", state)] if self.is_there else []

    def _wake(self) -> None:
        self.num_wakes += 1

    async def run(self, item: GenerateRequest) -> None:
        """What the fleet does: enter, show up in the replica, say so."""
        try:
            await self.gate.enter(item)
            self.running.append(item.request_id)
        finally:
            self.gate.passed(item.request_id)

    def finish(self, request_id: str) -> None:
        self.running.remove(request_id)
        self.gate.open()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_as_many_pass_as_there_are_places_and_the_rest_follows_in_order() -> None:
    place = Place()
    tasks = [asyncio.create_task(place.run(request(str(number)))) for number in range(6)]
    await settle()
    assert place.running == ["0", "1", "2"]
    load = place.gate.load()
    assert (load.num_held, load.held_prompt_tokens, load.held_output_tokens) == (3, 9, 24)
    for number in range(6):
        place.finish(str(number))
        await settle()
        assert len(place.running) <= 3
    assert place.gate.load().held_prompt_tokens == 0
    await asyncio.gather(*tasks)


async def test_keys_take_turns_whoever_came_first() -> None:
    place = Place()
    first = [request(f"a{number}", "a", max_tokens=2000) for number in range(8)]
    then = [request(f"b{number}", "b", max_tokens=2000) for number in range(3)]
    tasks = [asyncio.create_task(place.run(item)) for item in (*first, *then)]
    await settle()
    served = []
    while place.running:
        served.append(place.running[0])
        place.finish(served[-1])
        await settle()
    assert served[:9] == ["a0", "a1", "a2", "a3", "b0", "a4", "b1", "a5", "b2"]
    await asyncio.gather(*tasks)


async def test_a_request_that_goes_away_leaves_its_place_to_others() -> None:
    place = Place()
    tasks = [asyncio.create_task(place.run(request(str(number)))) for number in range(5)]
    await settle()
    tasks[3].cancel()
    await settle()
    assert place.gate.num_waiting == 1
    place.running.remove("0")
    place.gate.open()
    tasks[4].cancel()  # called and cancelled in the same turn of the loop
    await settle()
    assert place.running == ["1", "2"]
    late = asyncio.create_task(place.run(request("late")))
    await settle()
    assert place.running == ["1", "2", "late"], "a place was lost"
    await asyncio.gather(*tasks, late, return_exceptions=True)


async def test_beyond_the_bound_requests_are_refused() -> None:
    place = Place(max_queued_requests=2)
    tasks = [asyncio.create_task(place.run(request(str(number)))) for number in range(5)]
    await settle()
    with pytest.raises(QueueFullError) as error:
        await place.run(request("too many"))
    assert error.value.retry_after_s >= 1
    for task in tasks:
        task.cancel()


async def test_without_a_replica_requests_wait_and_somebody_is_woken() -> None:
    place = Place(start_timeout_s=0.05)
    place.is_there = False
    waiting = asyncio.create_task(place.run(request("patient")))
    await settle()
    assert place.num_wakes == 1
    place.is_there = True
    place.gate.open()
    await waiting
    place.is_there = False
    with pytest.raises(EngineDeadError, match="No replica was ready within"):
        await place.run(request("too early"))
    assert place.gate.num_waiting == 0


async def test_choices_of_a_request_go_in_parts_that_fit_one_call_for_each() -> None:
    cluster = FakeCluster(balanced, engine_backlog=0)
    replicas = [await cluster.start_replica() for _ in range(2)]
    for replica, max_num_seqs in zip(replicas, (4, 8), strict=True):
        replica.max_num_seqs = max_num_seqs
    await until(lambda: {s.state.max_num_seqs for s in cluster.fleet.snapshots} == {4, 8})

    async def run(number: int) -> None:
        await cluster.fleet.generate(request(str(number), max_tokens=50), lambda chunks: None)

    choices = [asyncio.create_task(run(number)) for number in range(12)]
    await until(lambda: sum(len(replica.received) for replica in replicas) == 12)
    assert [len(replica.received) for replica in replicas] == [4, 8]
    assert [replica.num_submissions for replica in replicas] == [1, 1]
    await asyncio.gather(*choices)


async def test_a_fleet_never_sends_more_than_a_replica_has_places() -> None:
    cluster = FakeCluster(round_robin, engine_backlog=2)
    replicas = [await cluster.start_replica() for _ in range(2)]
    for replica in replicas:
        replica.max_num_seqs = 4
    await until(lambda: all(s.state.max_num_seqs == 4 for s in cluster.fleet.snapshots))

    async def run(number: int) -> int:
        chunks: list[TokenChunk] = []
        await cluster.fleet.generate(request(str(number), max_tokens=5), chunks.extend)
        return sum(len(chunk.token_ids) for chunk in chunks)

    assert await asyncio.gather(*(run(number) for number in range(60))) == [5] * 60
    assert all(0 < replica.most_running <= 6 for replica in replicas)
