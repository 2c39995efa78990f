"""The adapter to Ray Serve's request router: calls go where the fleet decided.

The fleet (``cluster/serving/fleet.py``) picks a replica from its own, fresher numbers and passes the id as the
``replica_id`` keyword of every call; this router obeys, and announces every change of Serve's set of running
replicas. Knows Serve's router interface and nothing about policies. Serve pickles this module by value: it must not
hold state.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.routing import running_replicas


class PinnedRouter(RequestRouter):
    """Sends each call to the replica named by its ``replica_id`` keyword."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's news of the running replicas, passed on to the fleet."""
        super().update_replicas(replicas)
        ids = frozenset(str(replica.replica_id.unique_id) for replica in replicas)
        running_replicas.announce(self._deployment_id.app_name, self._deployment_id.name, ids)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The pinned replica, or none while it is not running: the fleet gives up on it by itself."""
        if pending_request is None:
            return [list(candidate_replicas)]
        # Without this Serve asks again at once, for ever and without yielding, while the replica is not there.
        pending_request.routing_context.should_backoff = True
        pinned: Any = pending_request.kwargs["replica_id"]
        if pinned is None:  # any replica will do: the call is there to be waiting
            return [list(candidate_replicas)]
        return [[replica for replica in candidate_replicas if replica.replica_id.unique_id == pinned]]
