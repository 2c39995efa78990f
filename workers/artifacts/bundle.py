"""A bundle as a reader sees it: the union of the manifests of a key that nobody superseded.

Publishers never change anything. Each writes one complete manifest that names those it took over, so that two who
publish at once leave two heads, whose entries are united by every reader and by the next publisher. Knows manifests
that have been verified already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from workers.artifacts.manifest import Entry, Kind, Manifest, Slot


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Everything there is for a key.

    Attributes:
        key: Digest of the graph-affecting factors.
        factors: As the newest head has them.
        entries: One per slot.
        heads: Digests of the manifests that it consists of.
        created_s: Of the newest head.
    """

    key: str
    factors: Mapping[str, Mapping[str, Any]]
    entries: tuple[Entry, ...]
    heads: tuple[str, ...]
    created_s: float

    def find(self, kind: Kind, name: str | None = None) -> Iterator[Entry]:
        """The entries of a kind, or the one of this name."""
        return (entry for entry in self.entries if entry.kind is kind and name in (None, entry.name))

    def first(self, kind: Kind, name: str | None = None) -> Entry | None:
        """The first of :meth:`find`, if there is one."""
        return next(self.find(kind, name), None)

    @property
    def num_bytes(self) -> int:
        """Size of all blobs, each counted once."""
        return sum({entry.sha256: entry.num_bytes for entry in self.entries}.values())

    @property
    def build_seconds(self) -> float:
        """What making all of it took: what a start saves that finds it."""
        return sum(entry.seconds for entry in self.entries)


def unite(
    manifests: Mapping[str, Manifest],
    *,
    is_trusted: Callable[[str | None], bool] = lambda origin: True,
    bad_blobs: Collection[str] = (),
) -> Bundle | None:
    """One bundle from the verified manifests of a key, by digest; None if there are none.

    Args:
        is_trusted: Whether entries of this origin are used: a manifest may hand on what a key made that is trusted
            no more.
        bad_blobs: Digests of blobs that must not be used.
    """
    if not manifests:
        return None
    superseded = {digest for manifest in manifests.values() for digest in manifest.supersedes}
    heads = {digest: manifest for digest, manifest in manifests.items() if digest not in superseded}
    # Ties are broken by digest, so that every reader sees the same bundle.
    ordered = sorted(heads, key=lambda digest: (heads[digest].created_s, digest))
    slots: dict[Slot, Entry] = {}
    for digest in ordered:
        for entry in heads[digest].entries:
            if is_trusted(entry.origin) and entry.sha256 not in bad_blobs:
                slots[entry.slot] = entry
    newest = heads[ordered[-1]]
    return Bundle(newest.key, newest.factors, tuple(slots.values()), tuple(ordered), newest.created_s)
