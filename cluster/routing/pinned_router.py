"""The adapter to Ray Serve's request router: calls go where the fleet decided.

The fleet (``cluster/serving/fleet.py``) picks a replica from its own, fresher numbers and passes the id as the
``replica_id`` keyword of every call; this router obeys, and tells the fleet whenever Serve's set of running
replicas changes. Knows Serve's router interface and nothing about policies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

#: Receives the unique ids of the running replicas; called on the router's event loop.
ReplicaListener = Callable[[frozenset[str]], None]

_lock = threading.Lock()
_listeners: dict[tuple[str, str], ReplicaListener] = {}
_running: dict[tuple[str, str], frozenset[str]] = {}


def listen(app_name: str, deployment: str, listener: ReplicaListener) -> None:
    """Call ``listener`` now, if the replicas are known, and at every change of a deployment's running replicas.

    One listener per deployment and process, since a process has one fleet per model.
    """
    key = (app_name, deployment)
    with _lock:
        _listeners[key] = listener
        known = _running.get(key)
    if known is not None:
        listener(known)


class PinnedRouter(RequestRouter):  # type: ignore[misc]  # Ray ships no types for its router interface
    """Sends each call to the replica named by its ``replica_id`` keyword."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's news of the running replicas, passed on to the fleet."""
        super().update_replicas(replicas)
        key = (self._deployment_id.app_name, self._deployment_id.name)
        ids = frozenset(str(replica.replica_id.unique_id) for replica in replicas)
        with _lock:
            _running[key] = ids
            listener = _listeners.get(key)
        if listener is not None:
            listener(ids)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The pinned replica, or none while it is not running: the fleet gives up on it by itself."""
        pinned: Any = pending_request.kwargs.get("replica_id") if pending_request is not None else None
        if pinned is None:
            return [list(candidate_replicas)]
        return [[replica for replica in candidate_replicas if replica.replica_id.unique_id == pinned]]
