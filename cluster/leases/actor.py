"""The named actor that holds a cluster's leases.

Detached, so that it outlives whoever asked first; restarted by Ray wherever there is room. What it must not forget, the
last token and who holds what, lies in the key-value store of Ray's control service and is read again after a restart.
"""

from __future__ import annotations

import json
import os

from ray.experimental import internal_kv

from workers.leases.base import HeldBy, Lease
from workers.leases.table import LeaseTable

NAME, NAMESPACE = "warmgraph-leases", "warmgraph"
_KEY = b"leases"


class LeaseActor:
    """One :class:`LeaseTable` for everybody. Calls run one after the other.

    Args:
        ttl_s: A holder that is not heard of for this long is taken over.
    """

    def __init__(self, ttl_s: float) -> None:
        saved = internal_kv._internal_kv_get(_KEY, namespace=NAMESPACE.encode())
        self._table = LeaseTable(ttl_s) if saved is None else LeaseTable.restored(json.loads(saved), ttl_s)

    def acquire(self, name: str, owner: str) -> Lease | HeldBy:
        """See :class:`workers.leases.base.LeaseService`, as for the other calls."""
        answer = self._table.acquire(name, owner)
        if isinstance(answer, Lease):
            self._save()
        return answer

    def heartbeat(self, lease: Lease) -> bool:
        """Keep a lease."""
        return self._table.heartbeat(lease)

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        self._table.release(lease)
        self._save()

    def holder(self, name: str) -> HeldBy | None:
        """Who has it."""
        return self._table.holder(name)

    def pid(self) -> int:
        """The actor's process, for whoever looks after the cluster."""
        return os.getpid()

    def _save(self) -> None:
        """Before the answer goes out: a token that somebody holds is never given again."""
        data = json.dumps(self._table.snapshot()).encode()
        internal_kv._internal_kv_put(_KEY, data, overwrite=True, namespace=NAMESPACE.encode())
