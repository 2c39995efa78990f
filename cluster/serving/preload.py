"""Imported by every Ray worker when it starts: the engine, and on a GPU the compilers, where a spare was asked for.

Ray imports it because of RAY_preload_python_modules. While a deployment starts, its controller, proxy and ingress have
no use for torch; once an engine runs on a node, what starts next there is most likely another one.
"""

from __future__ import annotations

import contextlib
import importlib

from cluster.serving.spare import wants_spare
from workers.startup.cuda import has_driver
from workers.startup.triton import prepare_triton

#: What a replica imports: Serve's side of it, and the engine.
_MODULES = ("ray.serve._private.replica", "cluster.serving.replica", "workers.engine.engine")

if wants_spare():
    for _module in _MODULES:
        # What cannot be imported here will be complained about by whoever needs it.
        with contextlib.suppress(ImportError):
            importlib.import_module(_module)
    if has_driver():
        prepare_triton()
        # Standalone pieces, which a node that has only just compiled them has, load through the compiler.
        with contextlib.suppress(ImportError):
            from workers.compile.prefetch import prefetch_compiler

            prefetch_compiler()
