"""Where plans and pieces are kept: a seam of two calls, and a folder behind it.

Bytes of a piece are code as soon as they are loaded, so everything that comes out of a store is compared with the
digest that its plan names before anything looks inside. Who may write a plan is the store's own business.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Protocol

from workers.compile.errors import CompileError, DamagedPieceError


class PieceStore(Protocol):
    """Bytes by name."""

    def get(self, name: str) -> bytes | None:
        """The bytes called ``name``, or None if there are none."""

    def put(self, name: str, data: bytes) -> None:
        """Keep ``data``; a reader sees all of it or nothing."""


class LocalPieceStore:
    """A private folder with one file per name.

    Raises:
        CompileError: The folder belongs to somebody else or is open to others, who could put code into it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CompileError(
                f"{folder} holds compiled code: it must belong to this user and be writable by nobody else."
            )
        self.folder = folder

    def get(self, name: str) -> bytes | None:
        """The file's content, or None."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """Write beside it, then move into place."""
        handle, scratch = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(scratch).replace(self._path(name))
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise

    def _path(self, name: str) -> Path:
        assert "/" not in name, name
        assert not name.startswith("."), name
        return self.folder / name


class MemoryPieceStore:
    """Nothing outlives the process."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        """What was put, or None."""
        return self._data.get(name)

    def put(self, name: str, data: bytes) -> None:
        """Keep it."""
        self._data[name] = data


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def put_blob(store: PieceStore, data: bytes) -> str:
    """Keep ``data`` under its digest, which is returned."""
    name = digest(data)
    store.put(name, data)
    return name


def get_blob(store: PieceStore, sha256: str) -> bytes:
    """The bytes with this digest.

    Raises:
        DamagedPieceError: They are missing, or are others.
    """
    data = store.get(sha256)
    if data is None:
        raise DamagedPieceError(f"Piece {sha256[:16]} is not in the store.")
    if digest(data) != sha256:
        raise DamagedPieceError(f"Piece {sha256[:16]} in the store is damaged; it was not loaded.")
    return data
