"""The warmgraph engine as a plain library: ``from workers import LLM, SamplingParams``.

Names are resolved on first use, so that importing bookkeeping (a config, sampling parameters) does not import
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.config import EngineConfig
    from workers.llm import LLM
    from workers.outputs import CompletionOutput, RequestOutput
    from workers.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "EngineConfig", "RequestOutput", "SamplingParams"]

_HOME = {
    "LLM": "workers.llm",
    "EngineConfig": "workers.config",
    "CompletionOutput": "workers.outputs",
    "RequestOutput": "workers.outputs",
    "SamplingParams": "workers.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workers' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
