"""Zip archives inside blobs: looked through before anything unpacks them, and unpacked with care.

Knows the zip format; nothing of what the members are.
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from workers.artifacts.errors import Refusal, RefusedError

_MAGIC = b"PK\x03\x04"
_MAX_MEMBERS = 65536
_CHUNK_BYTES = 1 << 20

#: Every member of an archive made here has this time, so that equal files give equal bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def is_zip(data: bytes) -> bool:
    """Whether the bytes begin as a zip archive does."""
    return data[:4] == _MAGIC


def check_zip(data: bytes, max_bytes: int) -> None:
    """Refuse an archive that would unpack to too much, or to a place outside.

    Sizes that an archive declares may lie, so every member is unpacked once, to nowhere, until the limit is reached.

    Raises:
        RefusedError: It is malformed, unpacks to more than ``max_bytes``, or has a member whose name climbs out, is
            absolute, or is a link.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) > _MAX_MEMBERS or sum(member.file_size for member in members) > max_bytes:
                raise RefusedError(Refusal.TOO_LARGE, f"An archive unpacks to more than {max_bytes} bytes.")
            left = max_bytes
            for member in members:
                _check_member(member)
                left -= _measure(archive, member, left)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise RefusedError(Refusal.MALFORMED, f"An archive is damaged: {error}.") from error


def pack(files: Mapping[str, bytes]) -> bytes:
    """An uncompressed archive; equal files give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), files[name])
    return buffer.getvalue()


def unpack(data: bytes, folder: Path, max_bytes: int) -> int:
    """Unpack an archive below a private folder that does not exist yet; returns the number of files.

    Raises:
        RefusedError: See :func:`check_zip`; nothing was written.
    """
    check_zip(data, max_bytes)
    folder.mkdir(parents=True, mode=0o700)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [member for member in archive.infolist() if not member.is_dir()]
        for member in names:
            path = folder / member.filename
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(archive.read(member))
    return len(names)


def _check_member(member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename)
    climbs = path.is_absolute() or ".." in path.parts or "\\" in member.filename or "\0" in member.filename
    kind = stat.S_IFMT(member.external_attr >> 16)
    if climbs or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise RefusedError(Refusal.MALFORMED, f"An archive has a member {member.filename[:80]!r}, which leads outside.")


def _measure(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> int:
    size = 0
    with archive.open(member) as file:
        while chunk := file.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > limit:
                raise RefusedError(Refusal.TOO_LARGE, "An archive unpacks to more than it declares.")
    return size
