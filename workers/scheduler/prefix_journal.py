"""What changed in a prefix cache, for a router that follows it from afar.

A reader keeps a set of names; :class:`PrefixChanges` brings it up to date. Names are the first 8 bytes of block
hashes: a router only estimates from them, so a collision costs a wrong guess, never a wrong token. Knows nothing about
blocks or who reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

#: Bytes of a block hash that travel.
NAME_BYTES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixChanges:
    """Cached blocks that came and went.

    Attributes:
        added: Names of blocks that are cached now, 8 bytes each, one behind the other.
        removed: Names of blocks that are not any more.
    """

    added: bytes = b""
    removed: bytes = b""


def split_names(packed: bytes) -> Iterator[bytes]:
    """The names in a field of :class:`PrefixChanges`."""
    return (packed[start : start + NAME_BYTES] for start in range(0, len(packed), NAME_BYTES))


def names_of(block_hashes: Iterable[bytes]) -> list[bytes]:
    """What block hashes are called here."""
    return [block_hash[:NAME_BYTES] for block_hash in block_hashes]


class PrefixJournal:
    """Collects changes until somebody takes them; a block that came and went in between is told as gone."""

    def __init__(self) -> None:
        self._is_cached: dict[bytes, bool] = {}

    def add(self, block_hash: bytes) -> None:
        """A block became findable."""
        self._is_cached[block_hash[:NAME_BYTES]] = True

    def remove(self, block_hash: bytes) -> None:
        """A block was evicted."""
        self._is_cached[block_hash[:NAME_BYTES]] = False

    def take(self) -> PrefixChanges | None:
        """The changes since the last call, or None if there are none."""
        if not self._is_cached:
            return None
        changes, self._is_cached = self._is_cached, {}
        return PrefixChanges(
            b"".join(name for name, is_cached in changes.items() if is_cached),
            b"".join(name for name, is_cached in changes.items() if not is_cached),
        )
