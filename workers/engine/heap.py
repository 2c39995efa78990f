"""Keeps the garbage collector away from what was there before the first step.

A full collection walks every object of the process: with torch and a compiled model 350,000 of them, in half a second,
in the middle of a step. Steps make few objects and no cycles, so it is enough to look at those.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Leave today's objects out of every collection inside the ``with`` block; afterwards they count again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
