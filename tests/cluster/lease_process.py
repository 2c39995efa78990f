"""Uses a cluster's leases as a driver of its own: ``RAY_ADDRESS=... python -m tests.cluster.lease_process``.

Prints one JSON line with what it saw.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time

import ray

from cluster.leases.actor import NAME, NAMESPACE
from cluster.leases.client import ClusterLeases
from workers.leases.base import HeldBy, Lease
from workers.leases.single_flight import FlightPolicy, Work, single_flight

TTL_S = 3.0


def main() -> None:
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    leases, other = ClusterLeases(TTL_S), ClusterLeases(TTL_S)
    seen: dict[str, object] = {}
    lease = leases.acquire("build", "a")
    assert isinstance(lease, Lease)
    seen["held_by"] = _owner(other.acquire("build", "b"))
    actor = ray.get_actor(NAME, namespace=NAMESPACE)
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
    seen["beat_after_restart"] = leases.heartbeat(lease)
    seen["held_by_after_restart"] = _owner(other.acquire("build", "b"))
    next_lease = other.acquire("another", "b")
    assert isinstance(next_lease, Lease)
    seen["tokens_rise"] = next_lease.token > lease.token
    time.sleep(TTL_S + 0.5)  # the owner is silent
    published: list[str] = []
    work = Work("build", lambda: published[0] if published else None, lambda: "made", published.append)
    seen["takeover"] = single_flight(work, other, FlightPolicy(deadline_s=10.0)).outcome
    seen["beat_after_takeover"] = leases.heartbeat(lease)
    ray.kill(actor, no_restart=True)
    print(json.dumps(seen))


def _owner(answer: Lease | HeldBy) -> str | None:
    return answer.owner if isinstance(answer, HeldBy) else None


if __name__ == "__main__":
    main()
