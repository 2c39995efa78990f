"""Engines that die of a request, hang, raise, or cannot be built, and clients that flood: the fleet lives on."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray.util

from benchmarks.stub_engine import stub_token
from tests.cluster.conftest import Deployment
from tests.cluster.faulty_app import BROKEN, FREEZE, KEYS, MAX_NUM_SEQS, NAME, POISON, RAISE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@dataclasses.dataclass(frozen=True, slots=True)
class Faulty:
    """Three replicas of an engine that fails on demand."""

    url: str
    folder: Path
    deployment: Deployment

    def pids(self) -> list[int]:
        return self.deployment.pids(f":engine-{NAME}")

    def logs(self) -> list[Path]:
        """One for every replica that was ever started."""
        return [*self.deployment.ray_dir.glob(f"session_latest/logs/serve/replica_{NAME}_engine-{NAME}_*")]

    def status(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/status", timeout=60)
        # Until HAProxy knows the application its URLs are the other one's, and without its ingress nobody answers.
        if answer.status_code in (404, 502, 503):
            return {"replicas": {}}
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["models"][NAME])

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + 90
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.3)

    def wait_until_whole(self) -> None:
        self.wait_for(lambda status: len(status["replicas"]) == 3)

    def num_held(self) -> float:
        """Requests that wait at the ingress."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return sum(
            float(line.split()[-1]) for line in text.splitlines() if line.startswith("warmgraph_num_requests_held{")
        )

    async def complete(self, prompt: bytes, max_tokens: int = 30, key: str = KEYS["quiet"]) -> httpx.Response:
        body = {"model": NAME, "prompt": [*prompt], "max_tokens": max_tokens}
        async with httpx.AsyncClient(timeout=120, headers={"Authorization": f"Bearer {key}"}) as client:
            return await client.post(f"{self.url}/v1/completions", json=body)


@pytest.fixture(scope="module")
def faulty(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("stub")
    (port_file,) = deployment.ray_dir.glob("session_latest/gcs_server_port_*")
    address = f"{ray.util.get_node_ip_address()}:{port_file.read_text().strip()}"
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}  # as a cluster is that Ray starts
    run = functools.partial(subprocess.run, check=True, timeout=180, env=environment)
    run([sys.executable, "-m", "tests.cluster.faulty_app", address, str(folder)])
    faulty = Faulty(f"{deployment.url}/{NAME}", folder, deployment)
    faulty.wait_until_whole()
    yield faulty
    delete = "import ray, sys; from ray import serve; ray.init(address=sys.argv[1], log_to_driver=False); "
    delete += "serve.delete(sys.argv[2])"
    run([sys.executable, "-c", delete, address, NAME])


def assert_is_undisturbed(prompt: bytes, answer: httpx.Response, max_tokens: int = 30) -> None:
    assert answer.status_code == 200, answer.text
    expected = [stub_token(prompt, position) for position in range(max_tokens)]
    assert answer.json()["choices"][0]["text"] == bytes(expected).decode()


async def test_a_poisoned_request_is_refused_after_two_retries_and_the_others_live(faulty: Faulty) -> None:
    num_started = len(faulty.logs())
    others = [asyncio.create_task(faulty.complete(b"innocent %d" % number, 200)) for number in range(12)]
    await asyncio.sleep(0.5)
    answer = await faulty.complete(POISON)
    assert answer.status_code == 500, answer.text
    assert answer.json()["error"]["code"] == "request_kills_replicas"
    assert answer.headers["x-should-retry"] == "false"
    for number, other in enumerate(others):
        assert_is_undisturbed(b"innocent %d" % number, await other, 200)
    assert (await faulty.complete(POISON)).status_code == 500, "a client's own retry starts it all again"
    faulty.wait_until_whole()
    assert len(faulty.logs()) == num_started + 3, "the third replica that dies of it is the last one"
    (ingress,) = faulty.deployment.pids(f"{NAME}:ingress")
    os.kill(ingress, signal.SIGKILL)  # the next one has not seen anybody die
    while ingress in (pids := faulty.deployment.pids(f"{NAME}:ingress")) or not pids:
        await asyncio.sleep(0.3)
    faulty.wait_until_whole()
    assert (await faulty.complete(POISON)).json()["error"]["code"] == "request_kills_replicas"
    assert len(faulty.logs()) == num_started + 3, "it was told"


async def test_a_key_that_floods_leaves_another_its_share(faulty: Faulty) -> None:
    """Requests as large as a turn of the queue, so that keys alternate."""
    assert (await faulty.complete(b"hello", key="sk-unknown")).status_code == 401
    num_places = 3 * (MAX_NUM_SEQS + 1)
    num_flood, num_quiet = 4 * num_places, 5
    finished: list[str] = []

    async def ask(name: str, number: int) -> None:
        prompt = f"{name} {number} ".encode().ljust(2048, b".")
        assert_is_undisturbed(prompt, await faulty.complete(prompt, key=KEYS[name]))
        finished.append(name)

    flood = [asyncio.create_task(ask("flood", number)) for number in range(num_flood)]
    while await asyncio.to_thread(faulty.num_held) < 2 * num_places:
        assert len(finished) < num_places, "the flood is over before anybody waited"
        await asyncio.sleep(0.05)
    num_before = len(finished)
    await asyncio.gather(*(ask("quiet", number) for number in range(num_quiet)))
    # What ran when the quiet ones came, one for each of them, and what was done meanwhile beside the last of them.
    num_during = finished.count("flood") - num_before
    assert num_during <= 2 * num_places + num_quiet
    await asyncio.gather(*flood)


async def test_an_engine_that_hangs_is_left_at_its_step_s_deadline_and_replaced(faulty: Faulty) -> None:
    before = set(faulty.pids())
    prompt = FREEZE + str(faulty.folder / "frozen").encode()
    answers = await asyncio.gather(faulty.complete(prompt), *(faulty.complete(b"other %d" % n) for n in range(5)))
    for text, answer in zip([prompt, *(b"other %d" % n for n in range(5))], answers, strict=True):
        assert_is_undisturbed(text, answer)
    deadline = time.monotonic() + 60
    while before <= set(faulty.pids()):
        assert time.monotonic() < deadline, "the replica that hangs was not replaced"
        await asyncio.sleep(0.3)
    faulty.wait_until_whole()


async def test_an_engine_that_raises_counts_like_one_that_dies(faulty: Faulty) -> None:
    answer = await faulty.complete(RAISE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "request_kills_replicas")
    assert sum("the device fell off the bus" in log.read_text() for log in faulty.logs()) == 3
    assert_is_undisturbed(b"hello", await faulty.complete(b"hello"))
    faulty.wait_until_whole()


async def test_a_replica_that_cannot_be_built_leaves_the_others_serving_and_says_why(faulty: Faulty) -> None:
    (faulty.folder / BROKEN).touch()
    try:
        os.kill(faulty.pids()[0], signal.SIGKILL)
        faulty.wait_for(lambda status: "this engine cannot be built" in status["deployment"]["message"])
        assert_is_undisturbed(b"hello", await faulty.complete(b"hello"))
        assert faulty.status()["deployment"]["replicas"].get("RUNNING") == 2
        assert httpx.get(f"{faulty.url}/health", timeout=60).status_code == 200
    finally:
        (faulty.folder / BROKEN).unlink()
    faulty.wait_until_whole()
