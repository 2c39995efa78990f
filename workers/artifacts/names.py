"""Where things lie in a store. Every object's name is made here, and names that come from a store are checked here.

| name | object | written |
|---|---|---|
| ``blobs/<xx>/<sha256>`` | bytes, by their digest; shared between bundles | once |
| ``bundles/<key>/<sha256>`` | a signed manifest, by its digest | once, after its blobs |
| ``quarantine/<key>/<manifest>`` | why this manifest must not be used | once |
| ``failures/<key>/<time>`` | why building this key failed, and until when nobody tries again | once |
| ``pins/<key>`` | this key is never collected | once |
| ``uses/<key>/<day>`` | a replica used this key on that day | once a day |
| ``builds/<key>/<id>`` | somebody builds for this key; deleted when done | once per build |
| ``clock/<id>`` | nothing; shows whoever collects the store's time | once, then deleted |
| ``leases/<name>/...`` | the lease files of replicas without a cluster | see workers/leases |
"""

from __future__ import annotations

import re

from workers.artifacts.digest import is_sha256
from workers.artifacts.errors import Refusal, RefusedError

BLOBS = "blobs/"
BUNDLES = "bundles/"
QUARANTINE = "quarantine/"
FAILURES = "failures/"
PINS = "pins/"
USES = "uses/"
BUILDS = "builds/"
CLOCK = "clock/"

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=-]{0,127}")


def check_name(name: str) -> str:
    """The name, if it cannot lead out of a store.

    Raises:
        RefusedError: It is absolute, climbs, is hidden, or has characters that file systems or URLs read as something.
    """
    if not name or len(name) > 512 or not all(_PART.fullmatch(part) for part in name.split("/")):
        raise RefusedError(Refusal.MALFORMED, f"{name[:80]!r} is no name of an artifact.")
    return name


def blob_name(sha256: str) -> str:
    """Name of a blob.

    Raises:
        RefusedError: This is no digest.
    """
    if not is_sha256(sha256):
        raise RefusedError(Refusal.MALFORMED, f"{sha256[:80]!r} is no digest of a blob.")
    return f"{BLOBS}{sha256[:2]}/{sha256}"


def manifest_prefix(key: str) -> str:
    """Prefix of the manifests of a key."""
    return f"{BUNDLES}{key}/"


def last_part(name: str) -> str:
    """What follows the last slash."""
    return name.rpartition("/")[2]


def key_of(name: str) -> str:
    """The key in ``bundles/<key>/...``, ``quarantine/<key>/...`` and the like."""
    parts = name.split("/")
    return parts[1] if len(parts) > 1 else ""
