"""What an import tells whoever watches it. Knows nothing about terminals."""

from __future__ import annotations

import enum
from collections.abc import Callable


class Stage(enum.StrEnum):
    """Steps of an import, in order; each may be skipped. All but WAIT count bytes."""

    WAIT = "Waiting for another import"
    DOWNLOAD = "Downloading"
    CHECK = "Checking"
    UNPACK = "Unpacking"
    CONVERT = "Converting"
    VERIFY = "Verifying"


#: Called with (stage, amount done, amount in all). ``done == total`` ends a stage.
Progress = Callable[[Stage, int, int], None]


def silent(stage: Stage, done: int, total: int) -> None:
    """The progress callback for when nobody watches."""
