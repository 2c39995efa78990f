"""Leases as files of a folder that hosts may share, over NFS too. No server, no clocks compared.

A lease is the file of the highest token, ``token-000000000007``, made with O_EXCL: of all who try for the next number
one succeeds. Its owner counts up in ``beat-...7``, rewritten in place, because opening a file makes an NFS client ask
the server whether its content is current. Whoever waits remembers when, on its own monotonic clock, it saw the counter
change last. An owner on the same host is looked up, and taken over at once when its process is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from workers.leases.base import DEFAULT_TTL_S, HeldBy, Lease, LeaseUnavailableError
from workers.leases.owner import is_certainly_dead

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_TOKEN = re.compile(r"token-(\d{12})")
#: Old tokens that are kept, so that who looked long ago and tries for the next number finds it taken.
_KEPT = 16
#: A beat is padded to this many bytes, so that rewriting it in place never leaves a tail.
_BEAT_BYTES = 96


@dataclasses.dataclass(frozen=True, slots=True)
class _Beat:
    """What an owner last said of itself.

    Attributes:
        raw: The file as it is; that it changes is what shows life.
        held_s: Seconds since it took the lease, on its own clock.
    """

    raw: bytes
    held_s: float
    is_released: bool


@dataclasses.dataclass(slots=True)
class _Seen:
    token: int
    raw: bytes
    since_s: float


class FileLeases:
    """Leases below ``folder``.

    Args:
        folder: Made if it is not there.
        ttl_s: A holder whose counter stands still for this long is taken over.
        clock: Monotonic seconds of this process.
    """

    def __init__(self, folder: Path, ttl_s: float = DEFAULT_TTL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}
        self._own: dict[str, tuple[int, float]] = {}

    def acquire(self, name: str, owner: str) -> Lease | HeldBy:
        """See :class:`workers.leases.base.LeaseService`, as for the other calls."""
        with self._lock, _reported():
            folder = self._path(name)
            folder.mkdir(parents=True, exist_ok=True)
            last = _last_token(folder)
            if last and not self._is_free(name, last):
                current = self._describe(folder, last)
                return Lease(name, owner, last) if current.owner == owner else current
            token = last + 1
            if not _create(folder / _file("token", token), owner) or _last_token(folder) != token:
                # Somebody was quicker, or had been long ago and its file was cleared away since.
                return self._describe(folder, _last_token(folder))
            self._own[name] = (token, self._clock())
            self._write_beat(name, token, is_released=False)
            _clear(folder, token - _KEPT)
            return Lease(name, owner, token)

    def heartbeat(self, lease: Lease) -> bool:
        """Count up, unless there is a higher token."""
        with self._lock, _reported():
            if _last_token(self._path(lease.name)) != lease.token:
                return False
            self._write_beat(lease.name, lease.token, is_released=False)
            return True

    def release(self, lease: Lease) -> None:
        """Mark it as free for whoever comes next."""
        with self._lock, _reported():
            if _last_token(self._path(lease.name)) == lease.token:
                self._write_beat(lease.name, lease.token, is_released=True)

    def holder(self, name: str) -> HeldBy | None:
        """Who has it; a dead owner counts until it has been seen to be dead."""
        with self._lock, _reported():
            folder = self._path(name)
            last = _last_token(folder)
            return None if not last or self._is_free(name, last) else self._describe(folder, last)

    def _path(self, name: str) -> Path:
        assert _NAME.fullmatch(name), f"not a name for a lease: {name!r}"
        return self._folder / name

    def _is_free(self, name: str, token: int) -> bool:
        folder = self._path(name)
        beat = _read_beat(folder, token)
        if beat.is_released or is_certainly_dead(_read_owner(folder, token)):
            return True
        seen, now = self._seen.get(name), self._clock()
        if seen is None or (seen.token, seen.raw) != (token, beat.raw):
            self._seen[name] = _Seen(token, beat.raw, now)
            return False
        return now - seen.since_s > self._ttl_s

    def _describe(self, folder: Path, token: int) -> HeldBy:
        return HeldBy(_read_owner(folder, token), token, _read_beat(folder, token).held_s)

    def _write_beat(self, name: str, token: int, *, is_released: bool) -> None:
        now = self._clock()
        _, since_s = self._own.get(name, (token, now))
        beat = {"at": time.monotonic_ns(), "held_s": round(now - since_s, 3), "released": is_released}
        handle = os.open(self._path(name) / _file("beat", token), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(handle, json.dumps(beat).encode().ljust(_BEAT_BYTES), 0)
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LeaseUnavailableError(f"The lease folder cannot be used: {error}.") from error


def _file(kind: str, token: int) -> str:
    return f"{kind}-{token:012d}"


def _last_token(folder: Path) -> int:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    return max((int(match[1]) for name in names if (match := _TOKEN.fullmatch(name))), default=0)


def _create(path: Path, owner: str) -> bool:
    """Make the file with the owner's name in it; False if it is there."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(handle, owner.encode())
        os.fsync(handle)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return True


def _read_owner(folder: Path, token: int) -> str:
    try:
        return (folder / _file("token", token)).read_text(encoding="utf-8", errors="replace") or "unknown"
    except FileNotFoundError:
        return "unknown"


def _read_beat(folder: Path, token: int) -> _Beat:
    try:
        raw = (folder / _file("beat", token)).read_bytes()
        data = json.loads(raw)
        return _Beat(raw, float(data["held_s"]), bool(data["released"]))
    except FileNotFoundError:
        return _Beat(b"", 0.0, False)
    except (ValueError, KeyError, TypeError):
        # Read while it was being written: it will read otherwise the next time.
        return _Beat(b"", 0.0, False)


def _clear(folder: Path, up_to: int) -> None:
    for name in os.listdir(folder):
        kind, _, number = name.partition("-")
        if kind in ("token", "beat") and number.isdigit() and int(number) <= up_to:
            (folder / name).unlink(missing_ok=True)
