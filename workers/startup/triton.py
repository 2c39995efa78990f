"""Brings Triton up before torch is there: its import, and the digest of itself that names every kernel of its cache.

That digest reads the whole compiler, half a second in which the interpreter's lock is free. Where there is no Triton,
or it has moved things, nothing happens: Triton does by itself what was not done here.
"""

from __future__ import annotations

import contextlib


def prepare_triton() -> None:
    """Do it; takes about a second of a thread."""
    with contextlib.suppress(ImportError):
        from triton.runtime.cache import triton_key  # type: ignore[import-not-found,import-untyped,unused-ignore]

        triton_key()
