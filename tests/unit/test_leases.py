"""Lease services: one holder at a time, rising tokens, takeover of the dead, clocks that disagree."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.leases.base import HeldBy, Lease, LeaseService, LeaseUnavailableError
from workers.leases.files import FileLeases
from workers.leases.memory import MemoryLeases
from workers.leases.owner import describe, is_certainly_dead, new_owner
from workers.leases.table import LeaseTable


class Clock:
    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


Service = tuple[LeaseService, Clock]


@pytest.fixture(params=["memory", "files"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Service:
    clock = Clock()
    make: Callable[[], LeaseService] = {
        "memory": lambda: MemoryLeases(10.0, clock),
        "files": lambda: FileLeases(tmp_path, 10.0, clock),
    }[request.param]
    return make(), clock


def taken(answer: Lease | HeldBy) -> Lease:
    assert isinstance(answer, Lease)
    return answer


def test_one_owner_has_it_and_others_learn_who(service: Service) -> None:
    leases, clock = service
    lease = taken(leases.acquire("build", "a"))
    clock.now_s += 3
    assert leases.heartbeat(lease)
    held = leases.acquire("build", "b")
    assert held == HeldBy("a", lease.token, 3.0)
    assert leases.holder("build") == held
    assert isinstance(leases.acquire("other", "b"), Lease), "names are independent"


def test_asking_twice_gives_the_same_lease(service: Service) -> None:
    leases, _ = service
    assert leases.acquire("build", "a") == leases.acquire("build", "a")


def test_a_released_lease_goes_to_the_next_with_a_higher_token(service: Service) -> None:
    leases, _ = service
    first = taken(leases.acquire("build", "a"))
    leases.release(first)
    assert leases.holder("build") is None
    second = taken(leases.acquire("build", "b"))
    assert second.token > first.token
    leases.release(first)
    assert not leases.heartbeat(first)
    assert leases.heartbeat(second), "the former owner cannot give back what it no longer has"


def test_a_silent_owner_is_taken_over_and_fenced_off(service: Service) -> None:
    leases, clock = service
    first = taken(leases.acquire("build", "a"))
    for _ in range(4):
        clock.now_s += 8
        assert leases.heartbeat(first)
        assert isinstance(leases.acquire("build", "b"), HeldBy)
    clock.now_s += 10.5
    second = taken(leases.acquire("build", "b"))
    assert second.token > first.token
    assert not leases.heartbeat(first)
    assert leases.heartbeat(second)


def test_files_are_judged_by_the_clock_of_whoever_waits(tmp_path: Path) -> None:
    behind, ahead = Clock(5.0), Clock(9e8)
    owner, waiter = FileLeases(tmp_path, 10.0, behind), FileLeases(tmp_path, 10.0, ahead)
    lease = taken(owner.acquire("build", "a"))
    assert isinstance(waiter.acquire("build", "b"), HeldBy), "a clock decades ahead is no reason to take over"
    for _ in range(3):
        ahead.now_s += 9
        assert owner.heartbeat(lease), "the owner's own clock stands still and it lives all the same"
        assert isinstance(waiter.acquire("build", "b"), HeldBy)
    ahead.now_s += 11
    assert isinstance(waiter.acquire("build", "b"), Lease)


def test_a_process_that_is_gone_is_taken_over_at_once(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from workers.leases.files import FileLeases;"
    code += "from workers.leases.owner import new_owner; print(FileLeases(Path(sys.argv[1])).acquire('b', new_owner()))"
    made = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "token=1" in made.stdout
    assert taken(FileLeases(tmp_path).acquire("b", new_owner())).token == 2


def test_owners() -> None:
    owner = new_owner()
    assert owner != new_owner()
    assert not is_certainly_dead(owner)
    place, pid, _, attempt = owner.split("|")
    assert is_certainly_dead(f"{place}|{pid}|1|{attempt}"), "the process id is in use again by another process"
    assert not is_certainly_dead(f"elsewhere@1|{pid}|1|{attempt}")
    assert not is_certainly_dead("unknown")
    assert pid in describe(owner)


def test_a_folder_that_cannot_be_used_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LeaseUnavailableError, match="lease folder"):
        FileLeases(tmp_path / "file").acquire("build", "a")


def test_a_damaged_beat_is_not_a_sign_of_death(tmp_path: Path) -> None:
    leases = FileLeases(tmp_path, 10.0, Clock())
    lease = taken(leases.acquire("build", "a"))
    (tmp_path / "build" / f"beat-{lease.token:012d}").write_bytes(b'{"at": 1')
    assert isinstance(leases.acquire("build", "b"), HeldBy)


def test_a_table_survives_a_restart() -> None:
    clock = Clock()
    table = LeaseTable(10.0, clock)
    done = taken(table.acquire("done", "a"))
    table.release(done)
    lease = taken(table.acquire("build", "a"))
    clock.now_s = 3.0
    again = LeaseTable.restored(table.snapshot(), 10.0, clock)
    assert again.heartbeat(lease)
    assert isinstance(again.acquire("build", "b"), HeldBy)
    clock.now_s += 11
    assert taken(again.acquire("build", "b")).token > lease.token


_STEP = st.tuples(st.sampled_from(["acquire", "beat", "release", "wait", "restart"]), st.integers(0, 3))


@settings(max_examples=150, deadline=None)
@given(st.lists(_STEP, max_size=40))
def test_never_two_current_leases_and_never_a_smaller_token(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    table = LeaseTable(10.0, clock)
    leases: dict[int, Lease] = {}
    highest = 0
    for action, who in steps:
        if action == "acquire":
            answer = table.acquire("build", str(who))
            if isinstance(answer, Lease):
                assert answer.token >= highest
                highest, leases[who] = answer.token, answer
        elif action == "wait":
            clock.now_s += 4.0 * who
        elif action == "restart":
            table = LeaseTable.restored(table.snapshot(), 10.0, clock)
        elif who in leases:
            if action == "beat":
                assert not table.heartbeat(leases[who]) or leases[who].token == highest
            else:
                table.release(leases[who])
        assert sum(table.heartbeat(lease) for lease in set(leases.values())) <= 1
