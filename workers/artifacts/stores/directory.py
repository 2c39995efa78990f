"""A store in a directory, local or shared over NFS.

What works on NFS as on a local disk: a file is written under a name that no other host or process can have, flushed to
the server, and given its final name by ``link``, which fails if the name is taken. There are no locks, no file is
opened for appending, and none is ever changed. Symbolic links are never followed below the root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from workers.artifacts.errors import Refusal, RefusedError, StoreError
from workers.artifacts.names import check_name
from workers.artifacts.stores.base import StoredObject

#: Files being written, beside where they will lie. No object's name begins like this.
_SCRATCH_PREFIX = ".new-"

#: A scratch file of this age belongs to a writer that died.
_SCRATCH_AGE_S = 24 * 3600.0


class DirectoryStore:
    """See :class:`workers.artifacts.stores.base.ArtifactStore`.

    Args:
        root: Made with mode 0700 if it is not there. One that others may write to is accepted, as a shared directory
            has to be: what comes out of a store is verified in any case. What lies below it is as open as it is.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def get(self, name: str, max_bytes: int) -> bytes | None:
        """The file's content, or None."""
        path = self._path(name)
        try:
            self._check_parents(path)
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise RefusedError(Refusal.MALFORMED, f"{name} is a symbolic link.") from error
            raise _store_error(self.url, error) from error
        try:
            with os.fdopen(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise RefusedError(Refusal.MALFORMED, f"{name} is no regular file.")
                data = file.read(max_bytes + 1)
        except OSError as error:
            raise _store_error(self.url, error) from error
        if len(data) > max_bytes:
            raise RefusedError(Refusal.TOO_LARGE, f"{name} has more than {max_bytes} bytes.")
        return data

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write beside it, flush, and link into place."""
        path = self._path(name)
        try:
            mode = self._make_folders(path)
            self._check_parents(path)
            if os.path.lexists(path):
                return False
            scratch = path.parent / f"{_SCRATCH_PREFIX}{secrets.token_hex(16)}"
            try:
                _write(scratch, data, mode & 0o666)
                return _link(scratch, path)
            finally:
                with contextlib.suppress(OSError):
                    scratch.unlink()
        except OSError as error:
            raise _store_error(self.url, error) from error

    def list(self, prefix: str) -> list[StoredObject]:
        """By name; directories below the prefix are walked, links are passed over."""
        folder = self.root / prefix.rpartition("/")[0]
        try:
            found = [item for item in self._walk(folder) if item.name.startswith(prefix)]
        except OSError as error:
            raise _store_error(self.url, error) from error
        return sorted(found, key=lambda item: item.name)

    def delete(self, name: str) -> None:
        """Unlink."""
        path = self._path(name)
        try:
            self._check_parents(path)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _store_error(self.url, error) from error

    def _path(self, name: str) -> Path:
        return self.root / check_name(name)

    def _make_folders(self, path: Path) -> int:
        """Make what is missing above a file; returns the root's mode."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        mode = stat.S_IMODE(self.root.stat().st_mode)
        for folder in reversed(path.relative_to(self.root).parents[:-1]):
            with contextlib.suppress(FileExistsError):
                (self.root / folder).mkdir()
                (self.root / folder).chmod(mode)  # whatever the umask is
        return mode

    def _check_parents(self, path: Path) -> None:
        """Refuse a directory below the root that is a link: it would lead out of the store."""
        for folder in path.relative_to(self.root).parents:
            if folder != Path() and (self.root / folder).is_symlink():
                raise RefusedError(Refusal.MALFORMED, f"{self.root / folder} is a symbolic link.")

    def _walk(self, folder: Path) -> Iterator[StoredObject]:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    continue
                if entry.is_dir():
                    yield from self._walk(Path(entry.path))
                elif entry.is_file() and not self._is_scratch(entry):
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        status = entry.stat(follow_symlinks=False)
                        name = Path(entry.path).relative_to(self.root).as_posix()
                        yield StoredObject(name, status.st_size, status.st_mtime)

    def _is_scratch(self, entry: os.DirEntry[str]) -> bool:
        """Whether it is a file being written; what a dead writer left behind is removed."""
        if not entry.name.startswith("."):
            return False
        if entry.name.startswith(_SCRATCH_PREFIX):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _SCRATCH_AGE_S:
                    os.unlink(entry.path)
        return True


def _write(path: Path, data: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())


def _link(scratch: Path, path: Path) -> bool:
    """Give a finished file its name; False if the name is taken."""
    try:
        os.link(scratch, path)
        linked = True
    except FileExistsError:
        # An NFS server may have done it and the answer been lost: then the file has two names.
        linked = scratch.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        # A file system without hard links. Objects are immutable, so that the later of two equal writers may win.
        if os.path.lexists(path):
            return False
        scratch.rename(path)
        linked = True
    if linked:
        _sync_folder(path.parent)
    return linked


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # not every file system does
            os.fsync(handle)
    finally:
        os.close(handle)


def _store_error(url: str, error: OSError) -> StoreError:
    return StoreError(f"{url}: {error.strerror or error}.")
