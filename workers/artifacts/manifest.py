"""The manifest of a bundle: which blobs make it up, what each of them is, and for which key.

A manifest is JSON and nothing but JSON. It is parsed only after its signature has been verified, and strictly: an
unknown field, a wrong type or a name that could lead elsewhere is refused. The format: docs/artifacts.md.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Self

from workers.artifacts.digest import canonical_json, is_sha256
from workers.artifacts.errors import Refusal, RefusedError
from workers.artifacts.key import graph_digest

#: What an envelope says it holds.
PAYLOAD_TYPE = "application/vnd.warmgraph.bundle+json"

#: Raise it whenever a manifest of the previous code would be misread.
MANIFEST_VERSION = 1

#: No manifest is larger, in bytes; the one of a 32-layer model has about 20 kB.
MAX_MANIFEST_BYTES = 4 << 20

_MAX_ENTRIES = 4096
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=-]{0,127}")
_SECTIONS = ("graph", "capture", "runtime")


class Kind(enum.StrEnum):
    """What a blob is."""

    PLAN = "plan"
    """How pieces, split ops and weights make up the model: JSON."""
    PIECE = "piece"
    """A compiled piece in one format, for one size or all: code."""
    TRITON = "triton"
    """Kernels that Triton compiled outside of pieces, as files of its cache: code."""
    MEMORY_PLAN = "memory_plan"
    """What profiling found out about memory, by the digest of what it depends on: JSON."""
    HISTOGRAM = "histogram"
    """Batch sizes that one replica has seen, by replica: JSON."""
    SELF_CHECK = "self_check"
    """What pieces give for fixed inputs: JSON."""


#: Identifies an entry within a bundle: kind, name, format, size.
Slot = tuple[Kind, str, str | None, int | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One blob of a bundle.

    Attributes:
        name: Within its kind: the key of a piece, say.
        sha256: Digest of the bytes, and their name in the store.
        format: Piece format, else None.
        size: The only value of the dynamic dimension that a piece serves, or None.
        seconds: What making it took.
        origin: Id of the key of whoever made it; None where nothing is signed.
    """

    kind: Kind
    name: str
    sha256: str
    num_bytes: int
    format: str | None = None
    size: int | None = None
    seconds: float = 0.0
    origin: str | None = None

    @property
    def slot(self) -> Slot:
        """What it is in its bundle; two entries of one slot replace each other."""
        return (self.kind, self.name, self.format, self.size)


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """A bundle as one publisher saw it.

    Attributes:
        key: Digest of the graph-affecting factors.
        factors: The three sections of the key, in clear.
        entries: Complete, not only what was added.
        created_s: Seconds since the epoch by the publisher's clock; decides nothing but ties.
        supersedes: Digests of the manifests whose entries this one took over.
        creator: Version of the code that wrote it.
    """

    key: str
    factors: Mapping[str, Mapping[str, Any]]
    entries: tuple[Entry, ...]
    created_s: float
    supersedes: tuple[str, ...] = ()
    creator: str = ""

    def to_payload(self) -> bytes:
        """What is signed."""
        return canonical_json({"version": MANIFEST_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def from_payload(cls, payload: bytes, key: str) -> Self:
        """Read what was signed.

        Args:
            key: Under which it was found.

        Raises:
            RefusedError: It is malformed, of another version, or of another key.
        """
        try:
            fields = json.loads(payload, object_pairs_hook=_without_duplicates)
            if isinstance(fields, dict) and (version := fields.pop("version", None)) != MANIFEST_VERSION:
                raise RefusedError(
                    Refusal.OTHER_VERSION, f"The manifest has version {version}; this code reads {MANIFEST_VERSION}."
                )
            manifest = cls(**{**fields, "entries": tuple(_entry(item) for item in fields["entries"])})
            manifest = dataclasses.replace(manifest, supersedes=tuple(manifest.supersedes))
            manifest._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RefusedError(Refusal.MALFORMED, f"The manifest is malformed: {error}.") from error
        if manifest.key != key or graph_digest(manifest.factors["graph"]) != key:
            raise RefusedError(Refusal.WRONG_KEY, f"The manifest belongs to key {manifest.key[:16]}, not {key[:16]}.")
        return manifest

    def _check(self) -> None:
        _require(is_sha256(self.key), "key")
        _require(isinstance(self.factors, dict) and tuple(sorted(self.factors)) == tuple(sorted(_SECTIONS)), "factors")
        _require(all(isinstance(section, dict) for section in self.factors.values()), "factors")
        _require(_is_number(self.created_s), "created_s")
        _require(isinstance(self.creator, str) and len(self.creator) <= 64, "creator")
        _require(all(map(is_sha256, self.supersedes)), "supersedes")
        _require(len(self.entries) <= _MAX_ENTRIES, "more entries than allowed")
        _require(len({entry.slot for entry in self.entries}) == len(self.entries), "two entries of one kind and name")


def _entry(fields: dict[str, Any]) -> Entry:
    entry = Entry(**{**fields, "kind": Kind(fields["kind"])})
    _require(isinstance(entry.name, str) and _NAME.fullmatch(entry.name) is not None, "name of an entry")
    _require(is_sha256(entry.sha256), "digest of an entry")
    _require(type(entry.num_bytes) is int and 0 <= entry.num_bytes < 1 << 50, "size of an entry")
    _require(entry.format is None or (isinstance(entry.format, str) and bool(_NAME.fullmatch(entry.format))), "format")
    _require(entry.size is None or (type(entry.size) is int and 0 < entry.size < 1 << 31), "batch size of an entry")
    _require(_is_number(entry.seconds), "seconds of an entry")
    _require(entry.origin is None or (isinstance(entry.origin, str) and len(entry.origin) <= 64), "origin")
    return entry


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers must not be able to see two different things in one manifest."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields
