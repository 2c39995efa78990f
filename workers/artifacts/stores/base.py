"""The seam between artifacts and where they lie: four calls on bytes and names."""

from __future__ import annotations

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a listing.

    Attributes:
        modified_s: When it was written, in seconds since the epoch, by the store's clock.
    """

    name: str
    num_bytes: int
    modified_s: float


class ArtifactStore(Protocol):
    """Immutable objects by slash-separated names. Every call raises StoreError if the store is in trouble.

    A reader sees all of an object or nothing. Nobody has to trust what it gets: callers verify.

    Attributes:
        url: For people.
    """

    url: str

    def get(self, name: str, max_bytes: int) -> bytes | None:
        """The object's bytes, or None if there is none.

        Raises:
            RefusedError: It has more than ``max_bytes``; no more than that was read.
        """

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write the object unless there is one; False if there was. Of two writers at once, one gets True."""

    def list(self, prefix: str) -> list[StoredObject]:
        """Every object whose name begins with ``prefix``, by name."""

    def delete(self, name: str) -> None:
        """Remove the object; one that is not there is fine."""
