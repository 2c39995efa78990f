"""Single flight: of all who need the same thing one builds it, and the others wait for it.

Waiting ends when the thing is there, when its builder died (then one of those who wait takes over), or at a deadline
(then whoever waited builds for itself). Knows neither what is built nor where it is kept.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import random
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from workers.leases.base import HeldBy, Lease, LeaseService, LeaseUnavailableError
from workers.leases.heartbeat import Heartbeat
from workers.leases.owner import describe, new_owner

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class FlightPolicy:
    """How long is waited for what, in seconds.

    Attributes:
        deadline_s: Longest wait for others; then the caller builds for itself.
        poll_s: Between two looks, give or take a fifth.
        heartbeat_s: Between two heartbeats of a builder.
        longest_build_s: A build that takes longer counts as stuck and may be taken over.
    """

    deadline_s: float = 180.0
    poll_s: float = 0.5
    heartbeat_s: float = 2.0
    longest_build_s: float = 1800.0


class Outcome(enum.StrEnum):
    """How a caller came to its result."""

    FOUND = "found"  #: It was there.
    WAITED = "waited"  #: Somebody else built it meanwhile.
    BUILT = "built"  #: This caller built it, under the lease.
    ALONE = "alone"  #: This caller built it for itself, without the lease, and did not publish it.


@dataclasses.dataclass(frozen=True, slots=True)
class Flight(Generic[T]):
    """A result and its story.

    Attributes:
        waited_s: Spent waiting for others.
        num_takeovers: Builders that this caller saw die.
        is_published: Whether others can find what this caller built.
        reason: Why it was built alone, or was not published; None if there is nothing to tell.
    """

    value: T
    outcome: Outcome
    waited_s: float = 0.0
    num_takeovers: int = 0
    is_published: bool = False
    reason: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Work(Generic[T]):
    """What there is to do.

    Attributes:
        name: Of the lease.
        find: Looks for the result; None if it is not there, or its store cannot be reached.
        build: Makes it; what it raises goes to the caller, and the lease to somebody else.
        publish: Lets others find it, if it is not there yet; False if that was refused. Called under the lease only.
            Failing is no reason to fail.
    """

    name: str
    find: Callable[[], T | None]
    build: Callable[[], T]
    publish: Callable[[T], bool | None]


def single_flight(
    work: Work[T],
    leases: LeaseService,
    policy: FlightPolicy | None = None,
    *,
    on_wait: Callable[[HeldBy], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Flight[T]:
    """Find, wait for, or build.

    Args:
        on_wait: Told at every look whose build is being waited for.

    Raises:
        Exception: Whatever ``find`` or ``build`` raises.
    """
    policy = policy or FlightPolicy()
    owner, started_s = new_owner(), clock()
    holders: list[int] = []
    while True:
        waited_s = clock() - started_s
        value = work.find()
        if value is not None:
            outcome = Outcome.WAITED if holders else Outcome.FOUND
            return Flight(value, outcome, waited_s if holders else 0.0, max(len(holders) - 1, 0))
        try:
            answer = leases.acquire(work.name, owner)
        except LeaseUnavailableError as error:
            return _build_alone(work, waited_s, len(holders), str(error))
        if isinstance(answer, Lease):
            return _build(work, leases, answer, policy, waited_s, len(holders))
        if answer.token not in holders:
            holders.append(answer.token)
            logger.info("%s is being built by %s; waiting", work.name, describe(answer.owner))
        if on_wait is not None:
            on_wait(answer)
        if waited_s >= policy.deadline_s:
            reason = f"{describe(answer.owner)} did not finish within {policy.deadline_s:g} s"
            return _build_alone(work, waited_s, len(holders) - 1, reason)
        left_s = policy.deadline_s - waited_s
        sleep(min(policy.poll_s * random.uniform(0.8, 1.2), left_s))


def _build_alone(work: Work[T], waited_s: float, num_takeovers: int, reason: str) -> Flight[T]:
    logger.warning("building %s without the lease: %s", work.name, reason)
    return Flight(work.build(), Outcome.ALONE, waited_s, num_takeovers, reason=reason)


def _build(
    work: Work[T], leases: LeaseService, lease: Lease, policy: FlightPolicy, waited_s: float, num_takeovers: int
) -> Flight[T]:
    try:
        # It may have been published between the last look and the lease.
        value = work.find()
        if value is not None:
            return Flight(value, Outcome.WAITED if num_takeovers else Outcome.FOUND, waited_s, num_takeovers)
        with Heartbeat(leases, lease, policy.heartbeat_s, policy.longest_build_s) as heartbeat:
            value = work.build()
            reason = _publish(work, value, heartbeat)
        return Flight(value, Outcome.BUILT, waited_s, num_takeovers, reason is None, reason)
    finally:
        _release(leases, lease)


def _publish(work: Work[T], value: T, heartbeat: Heartbeat) -> str | None:
    """Publish under the lease; returns why not."""
    try:
        if not heartbeat.still_holds():
            return "the lease was taken over while building"
        if work.publish(value) is False:
            return "the store did not take it"
    except Exception as error:
        # Who built it can use it whether or not others will.
        logger.exception("%s was built and could not be published", work.name)
        return f"publishing failed: {error}"
    return None


def _release(leases: LeaseService, lease: Lease) -> None:
    try:
        leases.release(lease)
    except LeaseUnavailableError as error:
        logger.warning("the lease of %s could not be released and will run out: %s", lease.name, error)
