"""Which replicas Serve runs, as told by the request router to whoever listens in the same process.

A module of its own because Serve pickles the request router's module by value: state kept there would be a copy.
Knows ids; nothing about Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

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


def announce(app_name: str, deployment: str, replica_ids: frozenset[str]) -> None:
    """Note a deployment's running replicas and tell its listener."""
    key = (app_name, deployment)
    with _lock:
        _running[key] = replica_ids
        listener = _listeners.get(key)
    if listener is not None:
        listener(replica_ids)
