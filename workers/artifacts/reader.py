"""Reads manifests and blobs from a store and verifies them: signature, then key, then digests. Changes nothing.

Whatever it returns is what a trusted key signed; what it refuses has not been parsed beyond what the refusal needed.
"""

from __future__ import annotations

from collections.abc import Iterator

from workers.artifacts.archives import check_zip, is_zip
from workers.artifacts.digest import sha256
from workers.artifacts.errors import Refusal, RefusedError
from workers.artifacts.manifest import MAX_MANIFEST_BYTES, PAYLOAD_TYPE, Entry, Manifest
from workers.artifacts.names import blob_name, last_part, manifest_prefix
from workers.artifacts.signing import unseal
from workers.artifacts.stores.base import ArtifactStore, StoredObject
from workers.artifacts.trust import Trust
from workers.config import ArtifactConfig

#: Manifests of one key that are looked at, the newest first; one is normal.
_MAX_MANIFESTS = 64


class VerifiedReader:
    """See the module.

    Args:
        store: Not trusted.
        trust: Whose signatures count.
        config: Limits.
    """

    def __init__(self, store: ArtifactStore, trust: Trust, config: ArtifactConfig) -> None:
        self._store = store
        self._trust = trust
        self._config = config

    def manifests(self, key: str) -> Iterator[tuple[StoredObject, Manifest | RefusedError]]:
        """Every manifest of a key, or why it is refused; marks are not looked at.

        Raises:
            StoreError: The store is in trouble.
        """
        newest = sorted(self._store.list(manifest_prefix(key)), key=lambda item: -item.modified_s)
        for item in newest[:_MAX_MANIFESTS]:
            try:
                yield item, self.manifest(item, key)
            except RefusedError as error:
                yield item, error

    def manifest(self, item: StoredObject, key: str) -> Manifest:
        """One manifest of a key.

        Raises:
            RefusedError: It is malformed, not trusted, or another key's.
            StoreError: The store is in trouble.
        """
        envelope = self._store.get(item.name, MAX_MANIFEST_BYTES)
        if envelope is None:
            raise RefusedError(Refusal.MISSING_BLOB, "It was removed while it was being looked at.")
        return self.unsealed(envelope, last_part(item.name), key)

    def unsealed(self, envelope: bytes, digest: str, key: str) -> Manifest:
        """What a sealed manifest says, once it is clear who says it.

        Args:
            digest: That it must have.
            key: That it must belong to.

        Raises:
            RefusedError: It is malformed, not trusted, or another key's.
        """
        if sha256(envelope) != digest:
            raise RefusedError(Refusal.MALFORMED, "Its bytes are not those that its name stands for.")
        payload, _ = unseal(envelope, PAYLOAD_TYPE, self._trust.keys, allow_unsigned=self._trust.allows_unsigned)
        return Manifest.from_payload(payload, key)

    def blob(self, entry: Entry) -> bytes:
        """The bytes of an entry, compared with its digest.

        Raises:
            RefusedError: They are missing, others, or too many.
            StoreError: The store is in trouble.
        """
        self.check_size(entry)
        data = self._store.get(blob_name(entry.sha256), entry.num_bytes)
        if data is None:
            raise RefusedError(Refusal.MISSING_BLOB, "It is not in the store.")
        if len(data) != entry.num_bytes or sha256(data) != entry.sha256:
            raise RefusedError(Refusal.DAMAGED_BLOB, "Its bytes are not those that were signed.")
        if is_zip(data):
            check_zip(data, self._config.max_unpacked_bytes)
        return data

    def check_size(self, entry: Entry) -> None:
        """Refuse an entry that is too large to be read.

        Raises:
            RefusedError: It is.
        """
        if entry.num_bytes > self._config.max_blob_bytes:
            raise RefusedError(Refusal.TOO_LARGE, f"It has {entry.num_bytes} bytes, above max_blob_bytes.")
