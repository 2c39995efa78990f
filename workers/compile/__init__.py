"""The compile layer: trace once, split at attention, compile unique pieces, load them without a compiler.

Importing it imports no compiler, and not even torch: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from workers.modes import CompilationMode

if TYPE_CHECKING:
    from workers.compile.decorator import support_torch_compile
    from workers.compile.model import CompiledModel, CompileReport, compile_model
    from workers.compile.plan import Plan
    from workers.compile.stitch import PieceInfo

__all__ = [
    "CompilationMode",
    "CompileReport",
    "CompiledModel",
    "PieceInfo",
    "Plan",
    "compile_model",
    "support_torch_compile",
]

_HOME = {
    "CompileReport": "workers.compile.model",
    "CompiledModel": "workers.compile.model",
    "PieceInfo": "workers.compile.stitch",
    "Plan": "workers.compile.plan",
    "compile_model": "workers.compile.model",
    "support_torch_compile": "workers.compile.decorator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workers.compile' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
