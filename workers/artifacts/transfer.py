"""Bundles as one file: out of a store, and into another one after everything in it has been verified.

The file is a zip archive of objects under their names in the store: blobs, then manifests. Signatures travel with it,
so the way it takes need not be trusted.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from workers.artifacts.digest import sha256
from workers.artifacts.errors import Refusal, RefusedError
from workers.artifacts.library import ArtifactLibrary
from workers.artifacts.manifest import MAX_MANIFEST_BYTES, Manifest
from workers.artifacts.names import BLOBS, BUNDLES, blob_name, check_name, key_of, last_part, manifest_prefix
from workers.artifacts.stores.base import ArtifactStore
from workers.errors import UserError

_MAX_MEMBERS = 65536


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """What was written.

    Attributes:
        keys: Bundles that came along.
        num_objects: Manifests and blobs; on import, those that were new.
        num_bytes: Their size.
    """

    keys: tuple[str, ...]
    num_objects: int
    num_bytes: int


def export_bundles(library: ArtifactLibrary, keys: Sequence[str], path: Path) -> Transfer:
    """Write bundles to a file, whole or not at all.

    Raises:
        UserError: A key has no bundle that is used here, or the file cannot be written.
        RefusedError: A blob is damaged.
        StoreError: The store is in trouble.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    num_objects = num_bytes = 0
    written: set[str] = set()
    try:
        with zipfile.ZipFile(scratch, "x", zipfile.ZIP_STORED) as archive:
            for key in keys:
                bundle = library.open_digest(key).bundle
                if bundle is None:
                    raise UserError(f"The store has no usable bundle {key[:16]}.", param="key")
                objects = {blob_name(entry.sha256): entry for entry in bundle.entries}
                for name, entry in objects.items():
                    if name not in written:
                        archive.writestr(name, library.reader.blob(entry))
                        written.add(name)
                for digest in bundle.heads:
                    name = f"{manifest_prefix(key)}{digest}"
                    archive.writestr(name, library.store.get(name, MAX_MANIFEST_BYTES) or b"")
                    written.add(name)
            num_objects, num_bytes = len(written), sum(item.file_size for item in archive.infolist())
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.", param="path") from error
    finally:
        scratch.unlink(missing_ok=True)
    return Transfer(tuple(keys), num_objects, num_bytes)


def import_bundles(library: ArtifactLibrary, path: Path) -> Transfer:
    """Verify a file's manifests and blobs, and only then write them to the store, blobs first.

    Raises:
        UserError: The file cannot be read.
        RefusedError: Something in it is not trusted or not what it says; nothing was written.
        StoreError: The store is in trouble.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            if len(members) > _MAX_MEMBERS:
                raise RefusedError(Refusal.TOO_LARGE, f"{path} has more than {_MAX_MEMBERS} members.")
            for name in members:
                check_name(name)
            manifests = {
                name: _member(archive, members[name], MAX_MANIFEST_BYTES) for name in members if _is_in(name, BUNDLES)
            }
            wanted = _verified_blobs(library, manifests)
            blobs = {name: _blob(archive, members, name, size) for name, size in wanted.items()}
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.", param="path") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise RefusedError(Refusal.MALFORMED, f"{path} is not an export of bundles: {error}.") from error
    if not manifests:
        raise UserError(f"{path} holds no bundle.", param="path")
    objects = {**blobs, **manifests}
    new = [name for name, data in objects.items() if _put(library.store, name, data)]
    keys = tuple(sorted({key_of(name) for name in manifests}))
    return Transfer(keys, len(new), sum(len(objects[name]) for name in new))


def _verified_blobs(library: ArtifactLibrary, manifests: dict[str, bytes]) -> dict[str, int]:
    """Names and sizes of the blobs that these manifests, once verified, name."""
    wanted: dict[str, int] = {}
    for name, envelope in manifests.items():
        manifest: Manifest = library.reader.unsealed(envelope, last_part(name), key_of(name))
        for entry in manifest.entries:
            if not library.trust.vouches(entry.origin):
                continue
            library.reader.check_size(entry)
            wanted[blob_name(entry.sha256)] = entry.num_bytes
    return wanted


def _is_in(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name.count("/") == 2


def _blob(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str, size: int) -> bytes:
    if name not in members:
        raise RefusedError(Refusal.MISSING_BLOB, f"The file lacks {name}.")
    data = _member(archive, members[name], size)
    if len(data) != size or sha256(data) != last_part(name):
        raise RefusedError(Refusal.DAMAGED_BLOB, f"{name} in the file is not what was signed.")
    return data


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, max_bytes: int) -> bytes:
    with archive.open(member) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise RefusedError(Refusal.TOO_LARGE, f"{member.filename} in the file has more than {max_bytes} bytes.")
    return data


def _put(store: ArtifactStore, name: str, data: bytes) -> bool:
    """Write an object; a blob that is there and damaged is replaced."""
    if store.put_if_absent(name, data):
        return True
    if name.startswith(BLOBS) and store.get(name, len(data)) != data:
        store.delete(name)
        return store.put_if_absent(name, data)
    return False
