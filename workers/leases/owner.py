"""Who an owner is, and whether it is certainly dead.

Within one host and process namespace a process can be looked up; of any other owner only its heartbeat is known.
"""

from __future__ import annotations

import functools
import os
import socket
import uuid
from pathlib import Path


def new_owner() -> str:
    """A name for one attempt of this process: place, process, start of the process, random part."""
    pid = os.getpid()
    return f"{_place()}|{pid}|{_start_ticks(pid) or 0}|{uuid.uuid4().hex[:8]}"


def is_certainly_dead(owner: str) -> bool:
    """Whether the owner's process ran here and is gone. False means alive, elsewhere, or not known."""
    place, _, rest = owner.partition("|")
    parts = rest.split("|")
    if place != _place() or len(parts) != 3 or not parts[0].isdigit() or not parts[1].isdigit() or parts[1] == "0":
        return False
    # A process id that was used again has another start time.
    return _start_ticks(int(parts[0])) != int(parts[1])


def describe(owner: str) -> str:
    """For a log line: host and process."""
    place, _, rest = owner.partition("|")
    return f"{place.split('@')[0]} process {rest.split('|')[0]}" if rest else owner


@functools.cache
def _place() -> str:
    """Host name, boot and process namespace: where a process id means the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return f"{socket.gethostname()}@{uuid.uuid4().hex}"
    return f"{socket.gethostname()}@{boot[:8]}-{namespace}"


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is no such process or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the command in parentheses and may hold anything.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
