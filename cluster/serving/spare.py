"""Keeps one worker process in store on a node, with an engine's imports done, for the next replica.

Ray takes a new actor's process from those that have done nothing yet; there are as many of them at first as the node
has CPUs, and later none. It starts one for any actor that is wanted, and keeps it if the actor is given up meanwhile:
that is how one is asked for here. Knows Ray's workers as processes of one parent, the node's raylet.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger("ray.serve")

#: How long after a replica became ready its node gets a spare: other replicas that start with it come first.
_DELAY_S = 5.0
#: Name of the file by which a replica asks for spares.
_FLAG = "warmgraph-spare"
#: Between wanting an actor and giving it up: enough for Ray to start a process, too short for the process to come up.
_WANTED_S = 0.5


def wants_spare() -> bool:
    """Whether a replica on this node has asked for a spare: then a new worker prepares to be one."""
    folder = _session_folder()
    return folder is not None and (folder / _FLAG).exists()


def keep_spare() -> None:
    """From now on have a spare on this node; returns at once."""
    timer = threading.Timer(_DELAY_S, _ask_for_spare)
    timer.daemon = True
    timer.start()


def _ask_for_spare() -> None:
    try:
        folder = _session_folder()
        if folder is None:
            logger.warning("no spare process on this node: Ray's session folder is not known")
            return
        with _one_at_a_time(folder / _FLAG):
            if not has_spare():
                _want_and_give_up()
    except Exception:
        # A node without a spare starts its next replica more slowly, and that is all.
        logger.exception("no spare process on this node")


def has_spare() -> bool:
    """Whether a worker of this node has done nothing yet, or is still coming up."""
    return any(line.startswith("ray::IDLE") or "default_worker.py" in line for line in _command_lines())


def _want_and_give_up() -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class: Any = ray.remote(_Nobody)
    actor = actor_class.options(num_cpus=0, scheduling_strategy=here).remote()
    time.sleep(_WANTED_S)
    ray.kill(actor)


class _Nobody:
    """The actor that is given up."""


def _session_folder() -> Path | None:
    """Where Ray keeps the files of this session, as the raylet was told; it goes away with the session."""
    try:
        arguments = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    folders = [argument.partition(b"=")[2] for argument in arguments if argument.startswith(b"--session_dir=")]
    return Path(os.fsdecode(folders[0])) if folders else None


@contextlib.contextmanager
def _one_at_a_time(flag: Path) -> Iterator[None]:
    """Among the replicas of this node; leaves the flag behind."""
    handle = os.open(flag, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _command_lines() -> list[str]:
    lines = []
    for children in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                lines.append(line.decode(errors="replace"))
    return lines
