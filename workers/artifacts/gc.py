"""Garbage collection: which bundles and blobs go, as a pure function of what lies in a store, and doing it.

Never a pinned or leased bundle, nor one that was made or used a short while ago: a replica may be starting from it.
Blobs go when no manifest names them any more, and not while they may belong to a manifest that is still being written.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Any

from workers.artifacts.digest import is_sha256
from workers.artifacts.errors import RefusedError
from workers.artifacts.library import ArtifactLibrary
from workers.artifacts.manifest import MAX_MANIFEST_BYTES
from workers.artifacts.names import BLOBS, BUILDS, BUNDLES, CLOCK, FAILURES, PINS, QUARANTINE, USES, key_of, last_part
from workers.artifacts.signing import read_unverified
from workers.artifacts.stores.base import ArtifactStore, StoredObject

_DAY_S = 24 * 3600.0

#: A build that began longer ago has ended, and its builder had no time to say so: twice what a build may take before it
#: counts as stuck and loses its lease.
_LONGEST_BUILD_S = 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class GcPolicy:
    """What may stay.

    Attributes:
        max_age_s: Bundles that were not used for longer go; None keeps them whatever their age.
        max_bytes: Of all bundles together; those used longest ago go first. None: any size.
        grace_s: Nothing younger goes.
    """

    max_age_s: float | None = None
    max_bytes: int | None = None
    grace_s: float = 24 * 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest as garbage collection sees it.

    Attributes:
        blobs: Digest and size of what it names; None if it cannot be read, or is of another version: then nothing is
            known of its blobs.
    """

    object: StoredObject
    blobs: Mapping[str, int] | None
    supersedes: Collection[str] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Inventory:
    """What lies in a store.

    Attributes:
        last_use_s: Seconds since the epoch, by key.
        kept: Keys that are pinned or leased.
        quarantined: Names of manifests that are marked.
        marks: Marks and notes, which go with their key.
        abandoned: Marks of builds that have ended, one way or another, and other things left behind.
        leased: Of ``kept``, the keys that somebody holds the lease of and builds for, as marks in the store say.
    """

    blobs: tuple[StoredObject, ...]
    manifests: tuple[StoredManifest, ...]
    last_use_s: Mapping[str, float]
    kept: frozenset[str]
    quarantined: frozenset[str]
    marks: tuple[StoredObject, ...] = ()
    abandoned: tuple[StoredObject, ...] = ()
    leased: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, slots=True)
class GcPlan:
    """What goes.

    Attributes:
        keys: Bundles that go as a whole.
        names: Of objects, in the order of their deletion: manifests before the blobs that they name.
        num_bytes: That are freed.
        kept: Why bundles stay that age or size would remove, by key.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    num_bytes: int
    kept: Mapping[str, str]


def plan_collection(inventory: Inventory, policy: GcPolicy, now_s: float) -> GcPlan:
    """Decide what goes."""
    by_key: dict[str, list[StoredManifest]] = {}
    for manifest in inventory.manifests:
        by_key.setdefault(key_of(manifest.object.name), []).append(manifest)
    used_s = {key: _last_use_s(inventory, key, manifests) for key, manifests in by_key.items()}
    doomed, kept = _doomed_keys(inventory, policy, by_key, used_s, now_s)
    gone = {item.object.name for key in doomed for item in by_key[key]}
    for key in by_key.keys() - doomed - inventory.kept:
        gone |= _obsolete(by_key[key], inventory.quarantined, policy.grace_s, now_s)
    blobs = _orphans(inventory, gone, policy.grace_s, now_s)
    dead = {item.name for item in inventory.marks if key_of(item.name) in doomed}
    dead |= {item.name for item in inventory.abandoned}
    sizes = {item.object.name: item.object.num_bytes for item in inventory.manifests}
    num_bytes = sum(sizes[name] for name in gone) + sum(item.num_bytes for item in blobs)
    names = (*sorted(gone), *sorted(item.name for item in blobs), *sorted(dead))
    return GcPlan(tuple(sorted(doomed)), names, num_bytes, kept)


def store_time_s(store: ArtifactStore) -> float:
    """What the clock says by which the store dates its objects: something is written, and its date read.

    Ages are differences of such dates. By a clock of its own that is ahead, whoever collects would take everything for
    old, bundles that replicas start from included.

    Raises:
        StoreError: The store is in trouble.
    """
    name = f"{CLOCK}{uuid.uuid4().hex}"
    store.put_if_absent(name, b"")
    try:
        return next((item.modified_s for item in store.list(CLOCK) if item.name == name), time.time())
    finally:
        store.delete(name)


def take_inventory(library: ArtifactLibrary, now_s: float) -> Inventory:
    """List a store. Blobs are listed before manifests, so that a blob of a new manifest is never an orphan.

    Args:
        now_s: By the store's clock.

    Raises:
        StoreError: The store is in trouble.
    """
    store = library.store
    blobs = store.list(BLOBS)
    builds = store.list(BUILDS)
    leased = frozenset(key_of(item.name) for item in builds if _is_recent(item, now_s))
    kept = leased | {key_of(item.name) for item in store.list(PINS)}
    uses = store.list(USES)
    last_use_s: dict[str, float] = {}
    for item in uses:
        # A use is noted once a day, so it may have been at the day's end.
        last_use_s[key_of(item.name)] = max(last_use_s.get(key_of(item.name), 0.0), item.modified_s + _DAY_S)
    marks = store.list(QUARANTINE)
    quarantined = frozenset(f"{BUNDLES}{item.name.removeprefix(QUARANTINE)}" for item in marks)
    manifests = tuple(_stored_manifest(library, item) for item in store.list(BUNDLES))
    notes = (*uses, *marks, *store.list(FAILURES))
    abandoned = tuple(item for item in (*builds, *store.list(CLOCK)) if not _is_recent(item, now_s))
    return Inventory(tuple(blobs), manifests, last_use_s, kept, quarantined, notes, abandoned, leased)


def _is_recent(mark: StoredObject, now_s: float) -> bool:
    return mark.modified_s > now_s - _LONGEST_BUILD_S


def collect(library: ArtifactLibrary, policy: GcPolicy, *, dry_run: bool = False) -> GcPlan:
    """Decide what goes, and remove it.

    Raises:
        StoreError: The store is in trouble.
    """
    now_s = store_time_s(library.store)
    plan = plan_collection(take_inventory(library, now_s), policy, now_s)
    if not dry_run:
        for name in plan.names:
            library.store.delete(name)
    return plan


def _doomed_keys(
    inventory: Inventory,
    policy: GcPolicy,
    by_key: Mapping[str, list[StoredManifest]],
    used_s: Mapping[str, float],
    now_s: float,
) -> tuple[set[str], dict[str, str]]:
    """Keys that go as a whole, oldest use first; and why others stay that should."""
    doomed: set[str] = set()
    kept: dict[str, str] = {}
    total = sum(_blob_sizes(inventory, by_key, set(by_key)).values())
    for key in sorted(by_key, key=lambda key: used_s[key]):
        is_old = policy.max_age_s is not None and now_s - used_s[key] > policy.max_age_s
        is_large = policy.max_bytes is not None and total > policy.max_bytes
        if not (is_old or is_large):
            continue
        if key in inventory.kept:
            kept[key] = "pinned or leased"
        elif now_s - used_s[key] <= policy.grace_s:
            kept[key] = "made or used a short while ago"
        else:
            doomed.add(key)
            total = sum(_blob_sizes(inventory, by_key, by_key.keys() - doomed).values())
    return doomed, kept


def _blob_sizes(
    inventory: Inventory, by_key: Mapping[str, list[StoredManifest]], keys: Collection[str]
) -> dict[str, int]:
    """Sizes of the blobs that these keys name, each blob once."""
    return {digest: size for key in keys for item in by_key[key] for digest, size in (item.blobs or {}).items()}


def _last_use_s(inventory: Inventory, key: str, manifests: Collection[StoredManifest]) -> float:
    made_s = max(item.object.modified_s for item in manifests)
    return max(made_s, inventory.last_use_s.get(key, 0.0))


def _obsolete(
    manifests: Collection[StoredManifest], quarantined: Collection[str], grace_s: float, now_s: float
) -> set[str]:
    """Manifests of a living key that nobody reads any more: superseded by a good one, or marked."""
    good = [item for item in manifests if item.blobs is not None and item.object.name not in quarantined]
    superseded = {digest for item in good for digest in item.supersedes}
    return {
        item.object.name
        for item in manifests
        if now_s - item.object.modified_s > grace_s
        and (last_part(item.object.name) in superseded or item.object.name in quarantined)
    }


def _orphans(inventory: Inventory, gone: Collection[str], grace_s: float, now_s: float) -> list[StoredObject]:
    """Blobs that no manifest names that stays."""
    staying = [item for item in inventory.manifests if item.object.name not in gone]
    if any(item.blobs is None for item in staying):
        # Somebody else's manifest, or one of a later version: its blobs are not known, so none is an orphan for sure.
        return []
    named = {digest for item in staying for digest in item.blobs or {}}
    return [item for item in inventory.blobs if last_part(item.name) not in named and now_s - item.modified_s > grace_s]


def _stored_manifest(library: ArtifactLibrary, item: StoredObject) -> StoredManifest:
    """Read without trusting: what a manifest names only keeps blobs from being removed."""
    try:
        envelope = library.store.get(item.name, MAX_MANIFEST_BYTES)
        fields: Any = json.loads(read_unverified(envelope or b""))
        blobs = {entry["sha256"]: int(entry["num_bytes"]) for entry in fields["entries"]}
        supersedes = [digest for digest in fields["supersedes"] if is_sha256(digest)]
    except (RefusedError, ValueError, KeyError, TypeError, RecursionError):
        return StoredManifest(item, None)
    return StoredManifest(item, blobs, supersedes)
