"""Whether a failure is the compiler's, or this machine's at this moment.

What the compiler cannot do now it cannot do in an hour either, nor on another replica, so that is worth remembering for
the fleet. A disk that is full, a process that was killed for its memory, or a store out of reach says nothing of the
code: the next start tries again. Knows errors and their messages only.
"""

from __future__ import annotations

import concurrent.futures.process
import errno
import re
import signal
import subprocess
from collections.abc import Iterator

import torch

from workers.artifacts.errors import StoreError

_KINDS = (
    MemoryError,
    TimeoutError,
    ConnectionError,
    StoreError,
    torch.OutOfMemoryError,
    # A process of the compiler's pool died, which on a machine short of memory is the kernel's doing.
    concurrent.futures.process.BrokenProcessPool,
)

#: Of the machine and not of what was asked of it.
_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EDQUOT,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EROFS,
        errno.ESTALE,
    }
)

#: What compilers, linkers and drivers write in such cases; Inductor passes on the text alone.
_TEXTS = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|Cannot allocate memory|virtual memory exhausted"
    r"|out of memory allocating|CUDA out of memory|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY"
    r"|Too many open files|Resource temporarily unavailable|Killed signal terminated program"
)


def is_transient(error: BaseException) -> bool:
    """Whether the same may go well elsewhere, or later: somewhere in the error's chain is one of the machine's."""
    return any(_is_of_the_machine(cause) for cause in _chain(error))


def _is_of_the_machine(error: BaseException) -> bool:
    if isinstance(error, _KINDS):
        return True
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return True
    if isinstance(error, subprocess.CalledProcessError) and error.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return True
    return _TEXTS.search(str(error)) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from; Dynamo keeps what its backend raised in an attribute."""
    todo, seen = [error], set[int]()
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        causes = (getattr(current, "inner_exception", None), current.__cause__, current.__context__)
        todo += [cause for cause in causes if isinstance(cause, BaseException)]
