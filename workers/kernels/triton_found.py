"""Whether Triton is installed, found out once and without importing it."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Kernels of our own can be used on a CUDA device."""
    return importlib.util.find_spec("triton") is not None
