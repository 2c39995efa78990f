"""Streams over replicas that die, hang, drain and come back: nothing lost, nothing twice. No Ray, no engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from cluster.messages import GenerateRequest
from cluster.routing.policies import round_robin
from cluster.serving.failover import ResumableRequest
from tests.fleet_fakes import HEARTBEAT_TIMEOUT_S, FakeCluster, expected_tokens, until
from workers.errors import EngineDeadError, PoisonedRequestError, QueueFullError
from workers.outputs import TokenChunk
from workers.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


def make_request(name: str, params: SamplingParams = GREEDY) -> GenerateRequest:
    return GenerateRequest(name, [*name.encode()], params)


async def collect(cluster: FakeCluster, request: GenerateRequest) -> list[TokenChunk]:
    chunks: list[TokenChunk] = []
    await cluster.fleet.generate(request, chunks.extend)
    return chunks


def tokens_of(chunks: list[TokenChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def assert_is_undisturbed(request: GenerateRequest, chunks: list[TokenChunk]) -> None:
    assert tokens_of(chunks) == expected_tokens(request)
    assert "".join(chunk.text for chunk in chunks) == "".join(f"{i} " for i in range(len(tokens_of(chunks))))
    assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [chunk.num_cached_tokens for chunk in chunks] == [7] + [None] * (len(chunks) - 1)
    assert {chunk.request_id for chunk in chunks} == {request.request_id}


async def test_a_killed_replicas_streams_go_on_elsewhere() -> None:
    cluster = FakeCluster(round_robin)
    first, second = [await cluster.start_replica() for _ in range(2)]
    requests = [make_request(f"request {i}") for i in range(8)]
    arrived: dict[str, list[TokenChunk]] = {request.request_id: [] for request in requests}
    tasks = [
        asyncio.create_task(cluster.fleet.generate(request, arrived[request.request_id].extend)) for request in requests
    ]
    # What the replica made and nobody got yet dies with it.
    await until(lambda: len(first.running) == 4 and all(len(tokens_of(arrived[name])) > 10 for name in first.running))
    first.die()
    await asyncio.gather(*tasks)
    for request in requests:
        assert_is_undisturbed(request, arrived[request.request_id])
    resumed = [request for request in second.received if request.attempt]
    assert len(resumed) == 4
    assert all(len(request.resume_token_ids) > 10 for request in resumed)
    assert not second.running


async def test_a_request_without_a_seed_keeps_its_random_stream() -> None:
    cluster = FakeCluster(round_robin)
    replicas = [await cluster.start_replica() for _ in range(2)]
    request = make_request("sampled", SamplingParams(temperature=1.0, max_tokens=40))
    task = asyncio.create_task(collect(cluster, request))
    await until(lambda: any(position > 10 for r in replicas for *_, position in r.running.values()))
    next(replica for replica in replicas if replica.running).die()
    chunks = await task
    (sent,) = {r.params.seed for replica in replicas for r in replica.received}
    assert sent is not None
    assert tokens_of(chunks) == expected_tokens(make_request("sampled", SamplingParams(seed=sent, max_tokens=40)))


async def test_a_stopped_replica_is_given_up_and_its_late_messages_are_ignored() -> None:
    cluster = FakeCluster(round_robin)
    first, second = [await cluster.start_replica() for _ in range(2)]
    requests = [make_request(f"request {i}", SamplingParams(temperature=0.0, max_tokens=1000)) for i in range(4)]
    tasks = [asyncio.create_task(collect(cluster, request)) for request in requests]
    await until(lambda: len(first.running) == 2 and all(position > 5 for *_, position in first.running.values()))
    first.is_stopped = True
    await until(lambda: len(second.running) == 4)
    first.is_stopped = False  # and what it still owed comes, beside what the other sends
    await until(lambda: len(cluster.fleet.snapshots) == 2)
    for request, task in zip(requests, tasks, strict=True):
        assert_is_undisturbed(request, await task)
    await until(lambda: not first.running)


async def test_an_offer_to_a_stopped_replica_goes_elsewhere_after_the_heartbeat_time_out() -> None:
    cluster = FakeCluster(round_robin)
    first, second = [await cluster.start_replica() for _ in range(2)]
    first.is_stopped = True
    started = asyncio.get_running_loop().time()
    requests = [make_request(f"request {i}") for i in range(2)]
    for request, chunks in zip(
        requests, await asyncio.gather(*(collect(cluster, request) for request in requests)), strict=True
    ):
        assert_is_undisturbed(request, chunks)
    assert asyncio.get_running_loop().time() - started < 10 * HEARTBEAT_TIMEOUT_S
    assert len(second.received) == 2


async def test_a_replica_that_does_not_answer_spoils_nobodys_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.serving.fleet._ASK_TIMEOUT_S", 0.05)
    cluster = FakeCluster(round_robin)
    stopped, other = [await cluster.start_replica() for _ in range(2)]
    stopped.is_stopped = True
    assert await cluster.fleet.stats() == {other.replica_id: f"figures of {other.replica_id}"}
    stopped.die()


async def test_all_replicas_die_and_the_streams_wait_for_a_new_one() -> None:
    cluster = FakeCluster(round_robin)
    first = await cluster.start_replica()
    request = make_request("patient")
    task = asyncio.create_task(collect(cluster, request))
    await until(lambda: any(position > 10 for *_, position in first.running.values()))
    first.die()
    await asyncio.sleep(0.05)
    assert not task.done()
    await cluster.replace(first)
    assert_is_undisturbed(request, await task)


async def test_no_replica_comes_and_the_client_is_told() -> None:
    cluster = FakeCluster(round_robin, start_timeout_s=0.1)
    with pytest.raises(EngineDeadError, match="No replica was ready"):
        await collect(cluster, make_request("lonely"))


async def test_a_resumed_request_is_taken_beyond_the_queues_bound() -> None:
    cluster = FakeCluster(round_robin)
    first, second = [await cluster.start_replica() for _ in range(2)]
    first.max_queued = second.max_queued = 2
    requests = [make_request(f"request {i}", SamplingParams(temperature=0.0, max_tokens=200)) for i in range(4)]
    tasks = [asyncio.create_task(collect(cluster, request)) for request in requests]
    await until(lambda: len(first.running) == len(second.running) == 2)
    with pytest.raises(QueueFullError):
        await collect(cluster, make_request("newcomer"))
    first.die()
    for request, task in zip(requests, tasks, strict=True):
        assert_is_undisturbed(request, await task)


async def test_a_request_that_waits_for_a_place_is_no_suspect_when_a_replica_dies() -> None:
    cluster = FakeCluster(round_robin, engine_backlog=0)
    replicas = [await cluster.start_replica() for _ in range(2)]
    for replica in replicas:
        replica.max_num_seqs = 1
    await until(lambda: all(s.state.max_num_seqs == 1 for s in cluster.fleet.snapshots))
    lost, other = make_request("lost"), make_request("other", SamplingParams(temperature=0.0, max_tokens=10_000))
    tasks = [asyncio.create_task(collect(cluster, request)) for request in (lost, other)]
    await until(lambda: all(len(replica.running) == 1 for replica in replicas))
    for replica in replicas:  # the first one dies under the one, the second one under the other
        replica.die()
        await until(lambda: cluster.fleet.num_held > 0)
    newcomer = asyncio.create_task(collect(cluster, make_request("newcomer")))
    await until(lambda: cluster.fleet.num_held == 3)
    third = await cluster.start_replica()
    third.max_num_seqs = 1
    assert_is_undisturbed(lost, await tasks[0])
    assert [(request.request_id, request.attempt) for request in third.received[:1]] == [("lost~1", 1)]
    tasks[1].cancel()
    newcomer.cancel()


async def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    cluster = FakeCluster(round_robin)
    first = await cluster.start_replica()
    request = make_request("slow", SamplingParams(temperature=0.0, max_tokens=200))
    task = asyncio.create_task(collect(cluster, request))
    await until(lambda: bool(first.running))
    second = await cluster.start_replica()
    cluster.remove(first)
    await asyncio.sleep(0.01)
    assert_is_undisturbed(make_request("new"), await collect(cluster, make_request("new")))
    assert len(second.received) == 1
    assert_is_undisturbed(request, await task)
    assert len(first.received) == 1


async def test_a_client_that_leaves_while_its_replica_drains_is_aborted() -> None:
    cluster = FakeCluster(round_robin)
    replica = await cluster.start_replica()
    task = asyncio.create_task(collect(cluster, make_request("gone", SamplingParams(max_tokens=10_000))))
    await until(lambda: any(position > 1 for *_, position in replica.running.values()))
    cluster.remove(replica)
    await asyncio.sleep(0.01)
    task.cancel()
    await until(lambda: "gone" in replica.aborted)
    assert not replica.running


async def test_a_reader_that_raises_ends_its_own_request_and_no_other() -> None:
    cluster = FakeCluster(round_robin)
    replica = await cluster.start_replica()
    request = make_request("good", SamplingParams(temperature=0.0, max_tokens=100))
    good = asyncio.create_task(collect(cluster, request))

    def refuse(chunks: Sequence[TokenChunk]) -> None:
        raise ZeroDivisionError("the reader's own")

    with pytest.raises(ZeroDivisionError, match="the reader's own"):
        await cluster.fleet.generate(make_request("bad", SamplingParams(max_tokens=10_000)), refuse)
    await until(lambda: replica.aborted == ["bad"])
    assert_is_undisturbed(request, await good)


# --- poison ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 15])
async def test_a_poisoned_request_takes_three_replicas_and_no_innocent_request(position: int) -> None:
    cluster = FakeCluster(round_robin, start_timeout_s=5.0)
    cluster.poison = lambda request, at: bytes(request.prompt_token_ids) == b"poison" and at >= position
    for _ in range(3):
        await cluster.start_replica()

    async def replace_dead() -> None:
        while True:
            await asyncio.sleep(0.01)
            for replica in cluster.replicas:
                if replica.is_dead:
                    del cluster.handle.replicas[replica.replica_id]
                    await cluster.replace(replica)

    replacing = asyncio.create_task(replace_dead())
    params = SamplingParams(temperature=0.0, max_tokens=300)
    innocents = [make_request(f"innocent {i}", params) for i in range(30)]
    tasks = [asyncio.create_task(collect(cluster, request)) for request in innocents]
    with pytest.raises(PoisonedRequestError, match="3 replicas died"):
        await collect(cluster, make_request("poison"))
    for request, task in zip(innocents, tasks, strict=True):
        assert_is_undisturbed(request, await task)
    num_started = cluster.num_started
    assert num_started == 6
    with pytest.raises(PoisonedRequestError):  # a client tries again, under a new id and with another seed
        await collect(cluster, GenerateRequest("again", [*b"poison"], GREEDY))
    assert cluster.num_started == num_started
    replacing.cancel()


class SharedRefusals:
    """What ingresses share, without Ray."""

    def __init__(self) -> None:
        self.digests: set[bytes] = set()

    async def publish(self, digest: bytes) -> None:
        self.digests.add(digest)

    async def read(self) -> frozenset[bytes]:
        return frozenset(self.digests)


async def test_what_one_ingress_refused_no_other_tries() -> None:
    refusals = SharedRefusals()
    first = FakeCluster(round_robin, refusals=refusals)
    first.poison = lambda request, at: bytes(request.prompt_token_ids) == b"poison"
    for _ in range(3):
        await first.start_replica()
    with pytest.raises(PoisonedRequestError):
        await collect(first, make_request("poison"))
    await until(lambda: bool(refusals.digests))
    second = FakeCluster(round_robin, refusals=refusals)  # another ingress, or the same after a restart
    second.poison = first.poison
    replica = await second.start_replica()
    with pytest.raises(PoisonedRequestError):
        await collect(second, make_request("poison"))
    assert not replica.is_dead
    request = make_request("innocent")
    assert_is_undisturbed(request, await collect(second, request))


async def test_chaos() -> None:
    """Many streams, replicas that die in turn: every stream is what an undisturbed one is."""
    cluster = FakeCluster(round_robin, start_timeout_s=5.0)
    for _ in range(3):
        await cluster.start_replica()
    rng = random.Random(0)

    async def kill() -> None:
        for _ in range(12):
            # As many steps as clear a request of a death, however slow this machine is.
            steps = {replica: replica.num_steps for replica in cluster.replicas}
            await until(lambda steps=steps: all(r.num_steps > steps.get(r, 0) + 10 for r in cluster.replicas))
            victim = rng.choice(cluster.replicas)
            victim.die() if rng.random() < 0.5 else setattr(victim, "is_stopped", True)
            await asyncio.sleep(0.3)
            victim.die()
            del cluster.handle.replicas[victim.replica_id]
            await cluster.replace(victim)

    killing = asyncio.create_task(kill())
    requests = [
        make_request(f"request {i}", SamplingParams(temperature=i % 2, seed=i, max_tokens=rng.randrange(1, 400)))
        for i in range(100)
    ]
    results = await asyncio.gather(*(collect(cluster, request) for request in requests))
    killing.cancel()
    for replica in cluster.replicas:
        if replica.is_stopped:
            replica.die()  # what is stopped for ever could not be taken down after the test either
    assert cluster.num_started > 4
    for request, chunks in zip(requests, results, strict=True):
        assert_is_undisturbed(request, chunks)
    alive = [replica for replica in cluster.replicas if not replica.is_dead and not replica.is_stopped]
    await until(lambda: not any(replica.running for replica in alive))
    for replica in cluster.replicas:
        replica.die()  # one that stays stopped would never let go of its step stream


# --- one request -----------------------------------------------------------------------------------------------------


def test_prompt_logprobs_are_asked_for_until_they_have_come() -> None:
    resumable = ResumableRequest(make_request("a", SamplingParams(temperature=0.0, prompt_logprobs=1)))
    assert resumable.next_attempt().params.prompt_logprobs == 1
    assert resumable.next_attempt().params.prompt_logprobs == 1
    resumable.accept(TokenChunk("a~1", [5], prompt_logprobs=[None]))
    third = resumable.next_attempt()
    assert (third.params.prompt_logprobs, third.resume_token_ids, third.request_id) == (None, (5,), "a~2")


def test_the_digest_is_of_what_is_computed() -> None:
    def digest(name: str, **params: object) -> bytes:
        return ResumableRequest(GenerateRequest(name, [1, 2], SamplingParams(**params))).digest  # type: ignore[arg-type]

    assert digest("a", seed=1) == digest("b", seed=2) == digest("c")
    assert digest("a") != digest("a", temperature=0.5)
