"""Makes the store that a config names, with its time-outs and its local tier.

Knows where a user's artifacts lie; nothing of what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workers.artifacts.digest import sha256
from workers.artifacts.errors import StoreError
from workers.artifacts.names import BLOBS, BUNDLES, QUARANTINE, last_part
from workers.artifacts.stores.base import ArtifactStore
from workers.artifacts.stores.directory import DirectoryStore
from workers.artifacts.stores.guarded import Direction, GuardedStore
from workers.artifacts.stores.object_store import SCHEMES, ObjectStore
from workers.artifacts.stores.tiered import TieredStore
from workers.config import ArtifactConfig
from workers.errors import ConfigError

#: What ``artifacts.store`` says for the user's own folder.
LOCAL = "local"

#: Of these the local tier keeps copies. Of two different marks on one manifest either will do.
COPIED = (BLOBS, BUNDLES, QUARANTINE)


def store_folder(store: str, folder: Path) -> Path | None:
    """Where a store lies that is a folder; None for one behind a URL.

    Args:
        store: As ``artifacts.store`` names it.
        folder: The user's artifact folder.
    """
    if "://" in store:
        return None
    return folder / "store" if store == LOCAL else Path(store).expanduser().absolute()


def open_store(
    config: ArtifactConfig, folder: Path, on_failure: Callable[[Direction], None] | None = None
) -> ArtifactStore:
    """The store that a config names.

    Args:
        folder: The user's artifact folder.
        on_failure: Told of each failed call.

    Raises:
        ConfigError: The URL is not one of a store.
    """
    assert config.store is not None
    if (root := store_folder(config.store, folder)) is not None:
        return GuardedStore(DirectoryStore(root), config.timeout_s, on_failure=on_failure)
    if config.store.partition("://")[0] not in SCHEMES:
        raise ConfigError(
            f"artifacts.store: {config.store!r} is neither a path nor a URL with one of {', '.join(SCHEMES)}.",
            param="store",
        )
    try:
        remote = ObjectStore(config.store, config.store_options, config.timeout_s)
    except StoreError as error:
        raise ConfigError(f"artifacts.store: {error}", param="store") from error
    guarded = GuardedStore(remote, config.timeout_s, on_failure=on_failure)
    if not config.local_tier:
        return guarded
    local = DirectoryStore(folder / "tier" / sha256(config.store.encode())[:16])
    return TieredStore(
        local, guarded, COPIED, is_intact, max_local_bytes=config.local_tier_bytes, lock_timeout_s=2 * config.timeout_s
    )


def is_intact(name: str, data: bytes) -> bool:
    """Whether these bytes can be the object of this name: most names are digests."""
    return not name.startswith((BLOBS, BUNDLES)) or last_part(name) == sha256(data)
