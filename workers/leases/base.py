"""The seam: what a lease is, and the four calls that every kind of lease service answers.

A lease has a fencing token, larger than that of every earlier lease of the name. A holder that was taken over finds its
heartbeat refused, and must not publish what it made. No call compares clocks of two machines: an owner is alive as
long as whoever judges it sees its heartbeat change, on that judge's own monotonic clock.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from workers.errors import WarmgraphError

#: A holder that is not heard of for this long, in seconds, is taken over.
DEFAULT_TTL_S = 15.0


class LeaseUnavailableError(WarmgraphError):
    """The lease service cannot be reached or written; whoever asked goes on without a lease."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """The right to do the work called ``name``.

    Attributes:
        owner: Unique per attempt, so that asking twice is harmless (:func:`workers.leases.owner.new_owner`).
        token: The fencing token.
    """

    name: str
    owner: str
    token: int


@dataclasses.dataclass(frozen=True, slots=True)
class HeldBy:
    """Somebody else's lease.

    Attributes:
        held_s: Since when, in seconds before now.
    """

    owner: str
    token: int
    held_s: float


class LeaseService(Protocol):
    """Hands out leases. Every call may raise :class:`LeaseUnavailableError`."""

    def acquire(self, name: str, owner: str) -> Lease | HeldBy:
        """Take the lease if it is free, released, or its owner is dead; the same lease again for the same owner."""

    def heartbeat(self, lease: Lease) -> bool:
        """Say that the owner is alive; False if the lease is no longer its own."""

    def release(self, lease: Lease) -> None:
        """Give it back; nothing happens if it is no longer the owner's."""

    def holder(self, name: str) -> HeldBy | None:
        """Who has it, or None."""
