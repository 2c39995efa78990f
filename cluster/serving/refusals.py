"""What all ingresses of a model know together: requests that are refused, because replicas keep dying of them.

Lies in the key-value store of Ray's control service, so that there is no process that could die and an ingress that
restarts forgets nothing. A key says everything, when it expires included, so nobody has to agree with anybody: each
refusal is written once and deleted by whoever reads it too late. Knows digests, nothing about requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from ray.exceptions import RayError
from ray.experimental import internal_kv

logger = logging.getLogger("ray.serve")

#: How long a refusal holds, in seconds.
MEMORY_S = 600.0
_NAMESPACE = b"warmgraph"


class Refusals(Protocol):
    """Digests of refused requests."""

    async def publish(self, digest: bytes) -> None:
        """Refuse a request everywhere."""

    async def read(self) -> frozenset[bytes] | None:
        """All that are refused now; None if it is not known."""


class ClusterRefusals:
    """The refusals of one model in a Ray cluster.

    Args:
        app_name, deployment_name: Of the model's replicas.
    """

    def __init__(self, app_name: str, deployment_name: str) -> None:
        self._prefix = f"refused/{app_name}/{deployment_name}/".encode()

    async def publish(self, digest: bytes) -> None:
        """Refuse a request everywhere, for :data:`MEMORY_S`; logs if the store does not answer."""
        key = self._prefix + f"{digest.hex()}/{time.time() + MEMORY_S:.0f}".encode()
        try:
            await asyncio.to_thread(internal_kv._internal_kv_put, key, b"", namespace=_NAMESPACE)
        except RayError as error:
            logger.warning("other ingresses will not know of a refused request: %s", error)

    async def read(self) -> frozenset[bytes] | None:
        """See :class:`Refusals`."""
        try:
            return await asyncio.to_thread(self._read)
        except RayError as error:
            logger.warning("what other ingresses refused is not known: %s", error)
            return None

    def _read(self) -> frozenset[bytes]:
        refused = set()
        for key in internal_kv._internal_kv_list(self._prefix, namespace=_NAMESPACE):
            digest, _, expires_s = key.removeprefix(self._prefix).decode().partition("/")
            if float(expires_s) < time.time():
                internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
            else:
                refused.add(bytes.fromhex(digest))
        return frozenset(refused)
