"""What a store holds, for people: one row per bundle, and a whole check of one.

Reads. Looking at a bundle marks manifests that anybody would refuse, as a replica does; nothing else is changed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

from workers.artifacts.bundle import Bundle
from workers.artifacts.errors import RefusedError
from workers.artifacts.gc import take_inventory
from workers.artifacts.library import ArtifactLibrary, Outcome
from workers.artifacts.manifest import Kind, Manifest
from workers.artifacts.names import BUNDLES, FAILURES, PINS, key_of, last_part
from workers.artifacts.quarantine import QuarantineMark
from workers.errors import UserError

#: Shortest beginning of a key that is taken for it.
MIN_PREFIX = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One bundle.

    Attributes:
        status: ``ok``, or why it is not used here: the outcome of looking it up.
        model: As the config named it that built it.
        device: Where it runs.
        formats: Piece formats that are complete for every size, and the sizes that have builds of their own.
        num_bytes: Of its blobs; those that it shares count in every bundle.
        build_seconds: What making it took.
        created_s: Seconds since the epoch, as is the next.
        last_use_s: None if no use has been noted yet.
        quarantine: Reasons of the marks on its manifests.
    """

    key: str
    status: str
    model: str = ""
    device: str = ""
    formats: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    num_entries: int = 0
    num_bytes: int = 0
    build_seconds: float = 0.0
    created_s: float = 0.0
    last_use_s: float | None = None
    is_pinned: bool = False
    is_leased: bool = False
    has_failed: bool = False
    quarantine: tuple[str, ...] = ()


def list_bundles(library: ArtifactLibrary) -> list[Row]:
    """Every key of the store, the newest first; also those that only have a failure or are being built.

    Raises:
        StoreError: The store is in trouble.
    """
    store = library.store
    inventory = take_inventory(library, time.time())
    marks: dict[str, list[QuarantineMark]] = {}
    for mark in library.marks.quarantined():
        marks.setdefault(mark.key, []).append(mark)
    pinned, failed = ({key_of(item.name) for item in store.list(prefix)} for prefix in (PINS, FAILURES))
    leased = inventory.leased
    made_s: dict[str, float] = {}
    for item in inventory.manifests:
        key = key_of(item.object.name)
        made_s[key] = max(made_s.get(key, 0.0), item.object.modified_s)
    rows = [
        dataclasses.replace(
            _row(library, key),
            created_s=made_s.get(key, 0.0),
            last_use_s=inventory.last_use_s.get(key),
            is_pinned=key in pinned,
            is_leased=key in leased,
            has_failed=key in failed,
            quarantine=tuple(sorted({mark.reason.value for mark in marks.get(key, [])})),
        )
        for key in {*made_s, *failed, *leased}
    ]
    return sorted(rows, key=lambda row: (-row.created_s, row.key))


def find_key(library: ArtifactLibrary, prefix: str) -> str:
    """The key in the store that begins like this.

    Raises:
        UserError: None does, or several do.
        StoreError: The store is in trouble.
    """
    keys = {key_of(item.name) for name in (BUNDLES, FAILURES) for item in library.store.list(name)}
    found = sorted(key for key in keys if key.startswith(prefix)) if len(prefix) >= MIN_PREFIX else []
    if len(found) == 1:
        return found[0]
    if len(prefix) < MIN_PREFIX:
        raise UserError(f"{prefix!r} is too short: give at least {MIN_PREFIX} digits of the key.", param="key")
    if not found:
        raise UserError(f"The store has no bundle whose key begins with {prefix}; see `warmgraph artifacts ls`.")
    raise UserError(f"{prefix} is the beginning of {len(found)} keys; give more digits.", param="key")


def describe(library: ArtifactLibrary, key: str) -> dict[str, Any]:
    """Everything about one bundle: factors, manifests, entries, marks.

    Raises:
        StoreError: The store is in trouble.
    """
    lookup = library.open_digest(key)
    superseded: set[str] = set()
    manifests = []
    for item, found in library.reader.manifests(key):
        fields: dict[str, Any] = {"manifest": last_part(item.name), "num_bytes": item.num_bytes}
        if isinstance(found, Manifest):
            superseded.update(found.supersedes)
            origins = sorted({entry.origin or "nobody" for entry in found.entries})
            fields |= {"created_s": found.created_s, "creator": found.creator, "origins": origins}
        else:
            fields |= {"refused": found.reason.value, "text": str(found)}
        manifests.append(fields)
    for fields in manifests:
        fields["is_superseded"] = fields["manifest"] in superseded
    bundle = lookup.bundle
    return {
        "key": key,
        "status": "ok" if bundle else lookup.outcome.value,
        "factors": dict(bundle.factors) if bundle else None,
        "entries": [dataclasses.asdict(entry) for entry in bundle.entries] if bundle else [],
        "manifests": manifests,
        "quarantine": [dataclasses.asdict(mark) for mark in library.marks.quarantined(key)],
    }


def verify(library: ArtifactLibrary, key: str) -> list[str]:
    """Read every manifest and blob of a bundle and compare; what is wrong, one sentence each, or nothing.

    Raises:
        StoreError: The store is in trouble.
    """
    problems = [
        f"Manifest {last_part(item.name)[:16]}: {found}"
        for item, found in library.reader.manifests(key)
        if isinstance(found, RefusedError)
    ]
    lookup = library.open_digest(key)
    if lookup.bundle is None:
        return problems or [f"It cannot be used: {lookup.outcome}."]
    return problems + list(_damage(library, lookup.bundle))


def _damage(library: ArtifactLibrary, bundle: Bundle) -> Iterator[str]:
    for entry in bundle.entries:
        try:
            library.reader.blob(entry)
        except RefusedError as error:
            yield f"{entry.kind} {entry.name[:16]}: {error}"


def _row(library: ArtifactLibrary, key: str) -> Row:
    lookup = library.open_digest(key)
    bundle = lookup.bundle
    if bundle is None:
        status = "none" if lookup.outcome is Outcome.ABSENT else lookup.outcome.value
        readable = next((found for _, found in library.reader.manifests(key) if isinstance(found, Manifest)), None)
        model, device = _origin(readable.factors) if readable else ("", "")
        return Row(key, status, model, device)
    pieces = list(bundle.find(Kind.PIECE))
    names = {entry.name for entry in pieces}
    formats = {entry.format or "" for entry in pieces}
    complete = [name for name in formats if names == {e.name for e in pieces if e.format == name and e.size is None}]
    model, device = _origin(bundle.factors)
    return Row(
        key,
        "ok",
        model,
        device,
        formats=tuple(sorted(complete)),
        sizes=tuple(sorted({entry.size for entry in pieces if entry.size is not None})),
        num_entries=len(bundle.entries),
        num_bytes=bundle.num_bytes,
        build_seconds=round(bundle.build_seconds, 3),
    )


def _origin(factors: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Model and device, as far as the factors name them."""
    environment = factors["graph"].get("environment")
    device = environment.get("device", "") if isinstance(environment, dict) else ""
    return str(factors["runtime"].get("model", "")), str(device)
