"""The graph layer: forward context, capture sizes, dispatch, captured graphs, and what they cost.

Names that need torch are resolved on first use, so that bookkeeping can import the rest without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from workers.graphs.choose import auto_capture_sizes, choose_capture_sizes, padded_work
from workers.graphs.context import (
    ForwardContext,
    LastRows,
    get_forward_context,
    is_forward_context_available,
    keep_last_rows,
    set_forward_context,
)
from workers.graphs.counters import GraphCounters
from workers.graphs.descriptor import BatchDescriptor, GraphKey
from workers.graphs.dispatcher import DispatchDecision, FallbackReason, GraphDispatcher
from workers.graphs.histogram import BatchHistogram, HistogramError
from workers.graphs.memory import GraphMemoryBudget, MemoryPolicy
from workers.graphs.plan import CapturePlan
from workers.graphs.report import GraphReport, make_report
from workers.graphs.resolve import ModeResolution, resolve_mode, resolve_mode_with_reason
from workers.graphs.sizes import default_capture_sizes
from workers.graphs.traffic import FileHistogramStore, HistogramStore, Traffic
from workers.modes import AttentionCGSupport, CompilationMode, CUDAGraphMode

if TYPE_CHECKING:
    from workers.graphs.backends.base import GraphBackend
    from workers.graphs.backends.factory import make_graph_backend
    from workers.graphs.wrapper import CUDAGraphWrapper

__all__ = [
    "AttentionCGSupport",
    "BatchDescriptor",
    "BatchHistogram",
    "CUDAGraphMode",
    "CUDAGraphWrapper",
    "CapturePlan",
    "CompilationMode",
    "DispatchDecision",
    "FallbackReason",
    "FileHistogramStore",
    "ForwardContext",
    "GraphBackend",
    "GraphCounters",
    "GraphDispatcher",
    "GraphKey",
    "GraphMemoryBudget",
    "GraphReport",
    "HistogramError",
    "HistogramStore",
    "LastRows",
    "MemoryPolicy",
    "ModeResolution",
    "Traffic",
    "auto_capture_sizes",
    "choose_capture_sizes",
    "default_capture_sizes",
    "get_forward_context",
    "is_forward_context_available",
    "keep_last_rows",
    "make_graph_backend",
    "make_report",
    "padded_work",
    "resolve_mode",
    "resolve_mode_with_reason",
    "set_forward_context",
]

_HOME = {
    "CUDAGraphWrapper": "workers.graphs.wrapper",
    "GraphBackend": "workers.graphs.backends.base",
    "make_graph_backend": "workers.graphs.backends.factory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workers.graphs' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
