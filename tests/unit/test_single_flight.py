"""Single flight: one build for all, takeover, deadline, fencing, and a service or a store that fails."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from workers.leases.base import HeldBy, Lease, LeaseUnavailableError
from workers.leases.files import FileLeases
from workers.leases.memory import MemoryLeases
from workers.leases.single_flight import Flight, FlightPolicy, Outcome, Work, single_flight

QUICK = FlightPolicy(deadline_s=5.0, poll_s=0.01, heartbeat_s=0.02, longest_build_s=10.0)


class Shelf:
    """Something to build, once."""

    def __init__(self, build: Callable[[], str] = lambda: "made") -> None:
        self.published: list[str] = []
        self.num_builds = 0
        self._build = build

    def work(self, publish: Callable[[str], None] | None = None) -> Work[str]:
        return Work("thing", self._find, self._count, publish or self.published.append)

    def _find(self) -> str | None:
        return self.published[0] if self.published else None

    def _count(self) -> str:
        self.num_builds += 1
        return self._build()


def run_together(count: int, run: Callable[[int], Flight[str]]) -> list[Flight[str]]:
    flights: list[Flight[str]] = []
    threads = [threading.Thread(target=lambda n=n: flights.append(run(n))) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(flights) == count
    return flights


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_eight_at_once_make_one_build(kind: str, tmp_path: Path) -> None:
    waiting: set[int] = set()

    def build_when_all_others_wait() -> str:
        deadline = time.monotonic() + 60
        while len(waiting) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        return "made"

    def fly(_: int) -> Flight[str]:
        return single_flight(
            shelf.work(),
            leases or FileLeases(tmp_path),
            patient,
            on_wait=lambda _: waiting.add(threading.get_ident()),
        )

    shelf = Shelf(build_when_all_others_wait)
    patient = dataclasses.replace(QUICK, deadline_s=60.0, longest_build_s=60.0)
    leases = MemoryLeases() if kind == "memory" else None
    flights = run_together(8, fly)
    assert shelf.num_builds == 1
    assert sorted(flight.outcome for flight in flights) == ["built"] + ["waited"] * 7
    assert {flight.value for flight in flights} == {"made"}
    assert [flight.is_published for flight in flights if flight.outcome is Outcome.BUILT] == [True]


def test_what_is_there_is_found_without_a_lease() -> None:
    shelf = Shelf()
    shelf.published.append("old")
    flight = single_flight(shelf.work(), Broken(), QUICK)
    assert (flight.value, flight.outcome, flight.waited_s) == ("old", Outcome.FOUND, 0.0)


def test_a_build_that_fails_is_the_callers_and_the_lease_the_next_ones() -> None:
    def fail() -> str:
        raise ValueError("no such op")

    leases = MemoryLeases()
    with pytest.raises(ValueError, match="no such op"):
        single_flight(Shelf(fail).work(), leases, QUICK)
    assert single_flight(Shelf().work(), leases, QUICK).outcome is Outcome.BUILT


def test_a_dead_builder_is_taken_over() -> None:
    shelf, leases = Shelf(), MemoryLeases(ttl_s=0.05)
    assert isinstance(leases.acquire("thing", "dead"), Lease)
    flight = single_flight(shelf.work(), leases, QUICK)
    assert (flight.outcome, flight.num_takeovers, flight.is_published) == (Outcome.BUILT, 1, True)


def test_after_the_deadline_a_waiter_builds_for_itself_and_does_not_publish() -> None:
    shelf, leases = Shelf(), MemoryLeases()
    leases.acquire("thing", "slow")
    seen: list[HeldBy] = []
    policy = FlightPolicy(deadline_s=0.05, poll_s=0.01)
    flight = single_flight(shelf.work(), leases, policy, on_wait=seen.append)
    assert (flight.outcome, flight.value, flight.is_published) == (Outcome.ALONE, "made", False)
    assert flight.waited_s >= 0.05
    assert "within 0.05 s" in (flight.reason or "")
    assert seen[0].owner == "slow"
    assert not shelf.published


def test_a_builder_that_was_taken_over_does_not_publish() -> None:
    now = [0.0]
    leases = MemoryLeases(ttl_s=10.0, clock=lambda: now[0])

    def stall() -> str:
        now[0] += 100.0  # stopped, and heard of by nobody
        assert isinstance(leases.acquire("thing", "other"), Lease)
        return "late"

    shelf = Shelf(stall)
    flight = single_flight(shelf.work(), leases, FlightPolicy(heartbeat_s=60.0))
    assert (flight.value, flight.is_published) == ("late", False)
    assert "taken over" in (flight.reason or "")
    assert not shelf.published
    holder = leases.holder("thing")
    assert holder is not None
    assert holder.owner == "other", "the lease of whoever took over was released by the former owner"


def test_a_build_that_is_stuck_stops_beating_and_is_taken_over() -> None:
    leases, goes_on = MemoryLeases(ttl_s=0.1), threading.Event()

    def stuck() -> str:
        assert goes_on.wait(10)
        return "late"

    first = Shelf(stuck)
    policy = FlightPolicy(heartbeat_s=0.02, longest_build_s=0.06)
    flights: list[Flight[str]] = []
    thread = threading.Thread(target=lambda: flights.append(single_flight(first.work(), leases, policy)))
    thread.start()
    while leases.holder("thing") is None:
        time.sleep(0.005)
    assert single_flight(Shelf().work(), leases, QUICK).outcome is Outcome.BUILT
    goes_on.set()
    thread.join()
    assert not flights[0].is_published


class Broken:
    """A lease service that is down."""

    def acquire(self, name: str, owner: str) -> Lease | HeldBy:
        raise LeaseUnavailableError("nobody answers")

    def heartbeat(self, lease: Lease) -> bool:
        raise LeaseUnavailableError("nobody answers")

    def release(self, lease: Lease) -> None:
        raise LeaseUnavailableError("nobody answers")

    def holder(self, name: str) -> HeldBy | None:
        raise LeaseUnavailableError("nobody answers")


def test_without_a_lease_service_everybody_builds_for_itself() -> None:
    flight = single_flight(Shelf().work(), Broken(), QUICK)
    assert (flight.outcome, flight.value, flight.reason) == (Outcome.ALONE, "made", "nobody answers")


def test_a_service_that_goes_down_while_building_stops_nothing_but_the_publication() -> None:
    leases = MemoryLeases()

    class Failing(Broken):
        def acquire(self, name: str, owner: str) -> Lease | HeldBy:
            return leases.acquire(name, owner)

    shelf = Shelf(lambda: time.sleep(0.05) or "made")
    flight = single_flight(shelf.work(), Failing(), QUICK)
    assert (flight.value, flight.is_published) == ("made", False)
    assert not shelf.published


def test_a_store_that_is_full_stops_nothing_but_the_publication() -> None:
    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    flight = single_flight(Shelf().work(full), MemoryLeases(), QUICK)
    assert (flight.value, flight.outcome, flight.is_published) == ("made", Outcome.BUILT, False)
    assert "No space left" in (flight.reason or "")
