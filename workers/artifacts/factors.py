"""Which of an engine's settings are part of a bundle's key: every config field, by name, in one of three sections.

A field that is in no table is a mistake that a test finds, so nobody can add a setting without saying whether compiled
code depends on it. Knows the config; what the machine and the sources add is collected in workers.compile.environment.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from workers.config import EngineConfig


class Section(enum.StrEnum):
    """What a setting changes."""

    GRAPH = "graph"
    """Compiled code: part of the key."""
    CAPTURE = "capture"
    """Which builds and graphs of a bundle are used, and how much memory they take; the code stays the same."""
    RUNTIME = "runtime"
    """Neither."""


_G, _C, _R = Section.GRAPH, Section.CAPTURE, Section.RUNTIME

#: Fields of EngineConfig. The value of a graph-affecting one is what it was resolved to, not what was written: ``auto``
#: and the default are the same setting as the value that they stand for.
ENGINE_FIELDS: Mapping[str, Section] = {
    "model": _G,  # its shape, as read from the checkpoint; not its name, path or weights
    "dtype": _G,
    "device": _G,  # its type; which machine it is comes from the environment
    "max_model_len": _G,  # the length of the rope table, which pieces take as an input of fixed shape
    "block_size": _G,  # the layout of the KV cache
    "num_threads": _G,  # on a CPU the number is compiled in
    "attention_backend": _G,
    "max_num_seqs": _C,
    "max_num_batched_tokens": _C,
    "gpu_memory_utilization": _C,
    "kv_cache_memory_bytes": _C,
    "num_gpu_blocks_override": _C,
    "enforce_eager": _C,  # nothing is compiled then
    "tokenizer": _R,
    "skip_tokenizer_init": _R,
    "load_format": _R,
    "seed": _R,
    "enable_prefix_caching": _R,
    "artifacts": _R,
}

#: Fields of CompilationConfig.
COMPILATION_FIELDS: Mapping[str, Section] = {
    "pass_config": _G,
    "inductor_compile_config": _G,
    "inductor_compile_config_for_sizes": _G,
    "mode": _C,  # only VLLM_COMPILE has bundles
    "compile_sizes": _C,  # a bundle gains a build per size
    "piece_format": _C,  # a bundle holds every format that was built
    "cudagraph_mode": _C,
    "cudagraph_capture_sizes": _C,
    "cudagraph_num_auto_sizes": _C,
    "max_cudagraph_capture_size": _C,
    "cudagraph_first_sizes": _C,
    "cudagraph_memory_limit_bytes": _C,
    "cudagraph_memory_policy": _C,
    "debug_graph_inputs": _R,
}


def config_sections(config: EngineConfig, resolved: Mapping[str, Any]) -> dict[Section, dict[str, Any]]:
    """An engine's settings by section, as JSON data.

    Args:
        resolved: What graph-affecting fields of EngineConfig stand for; all of them must be given.
    """
    sections: dict[Section, dict[str, Any]] = {section: {} for section in Section}
    values = config.model_dump(mode="json")
    compilation = values.pop("compilation_config")
    for name, section in ENGINE_FIELDS.items():
        sections[section][name] = resolved[name] if section is _G else values[name]
    for name, section in COMPILATION_FIELDS.items():
        # The compile layer names passes and options itself, with their defaults and sources.
        if section is not _G:
            sections[section][name] = compilation[name]
    sections[_R]["artifacts"] = {"store": config.artifacts.store, "trust": config.artifacts.trust}
    sections[_R]["model"] = config.model
    return sections
