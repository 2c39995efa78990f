"""The cluster's leases as a ``LeaseService``, for engines that run under Ray.

Knows how to reach the actor, and that it may be restarting or unreachable.
"""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from cluster.leases.actor import NAME, NAMESPACE, LeaseActor
from workers.leases.base import DEFAULT_TTL_S, HeldBy, Lease, LeaseUnavailableError

#: Longest wait for an answer, a restart of the actor included, in seconds.
_CALL_TIMEOUT_S = 20.0


class ClusterLeases:
    """A client of the cluster's :class:`LeaseActor`, which is started by the first call of anybody.

    Blocks, so it is not for an event loop. Every call may be sent twice, which does no harm.

    Args:
        ttl_s: For the actor, if this client starts it.
    """

    def __init__(self, ttl_s: float = DEFAULT_TTL_S) -> None:
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._actor: Any = None

    def acquire(self, name: str, owner: str) -> Lease | HeldBy:
        """See :class:`workers.leases.base.LeaseService`, as for the other calls."""
        answer: Lease | HeldBy = self._call("acquire", name, owner)
        return answer

    def heartbeat(self, lease: Lease) -> bool:
        """Keep a lease."""
        return bool(self._call("heartbeat", lease))

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        self._call("release", lease)

    def holder(self, name: str) -> HeldBy | None:
        """Who has it."""
        held: HeldBy | None = self._call("holder", name)
        return held

    def _call(self, method: str, *args: Any) -> Any:
        try:
            with self._lock:
                if self._actor is None:
                    self._actor = self._start()
                actor = self._actor
            return ray.get(getattr(actor, method).remote(*args), timeout=_CALL_TIMEOUT_S)
        except (RayError, GetTimeoutError, ValueError) as error:
            if isinstance(error, RayActorError):
                with self._lock:
                    self._actor = None  # it was removed on purpose: the next call starts another
            raise LeaseUnavailableError(f"The cluster's leases cannot be reached: {error}") from error

    def _start(self) -> Any:
        """The actor there is, or a new one."""
        actor_class: Any = ray.remote(LeaseActor)
        return actor_class.options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=3,
        ).remote(self._ttl_s)
