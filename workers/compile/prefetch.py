"""Imports the compiler in a thread of its own while something else, reading weights say, goes on.

The import takes seconds and is needed by every route but the one from AOTInductor or plain pieces. So does what torch
does at its first load of an artifact: it hashes its own compiler's sources, a third of a second or more. Knows module
names and nothing else.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time

from workers.compile import torch_compat

logger = logging.getLogger(__name__)

_MODULES = (
    "torch._dynamo",
    "torch._inductor.standalone_compile",
    "torch._inductor.compile_fx",
    # What the generated code of a piece imports besides.
    "torch._inductor.codegen.memory_planning",
    "torch._inductor.hooks",
    "multiprocessing.synchronize",
)

_lock = threading.Lock()
_thread: threading.Thread | None = None


def prefetch_compiler() -> None:
    """Begin the import, once per process; :func:`wait_for_compiler` ends it."""
    global _thread
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_import, name="prefetch-compiler", daemon=True)
            _thread.start()


def wait_for_compiler(*, only_if_begun: bool = False) -> None:
    """Have the compiler imported: by the thread, if there is one, so that two threads never import the same modules.

    Args:
        only_if_begun: Without a thread, import nothing.
    """
    with _lock:
        thread = _thread
    if thread is not None:
        thread.join()
    elif not only_if_begun:
        _import()


def _import() -> None:
    started = time.perf_counter()
    for module in _MODULES:
        importlib.import_module(module)
    torch_compat.hash_compiler_sources()
    logger.debug("compiler imported in %.2f s", time.perf_counter() - started)
