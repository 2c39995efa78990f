"""The capture sizes that a config asks for, and where the batches are kept that ``auto`` learns from.

Knows the config; how sizes are computed is ``workers.graphs``' part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging

from workers.artifacts.key import BundleKey
from workers.artifacts.library import ArtifactLibrary
from workers.checkpoint.cache import artifacts_root
from workers.config import EngineConfig
from workers.graphs import FileHistogramStore, Traffic, auto_capture_sizes, default_capture_sizes
from workers.graphs.traffic import HistogramStore
from workers.model.config import ModelConfig
from workers.runner.shared_traffic import SharedHistogramStore, host_name

logger = logging.getLogger(__name__)


def capture_sizes(config: EngineConfig, traffic: Traffic) -> tuple[list[int], str]:
    """The sizes, and where they come from, in words."""
    compilation = config.compilation_config
    limits = (config.max_num_seqs, config.max_num_batched_tokens)
    max_size = compilation.max_cudagraph_capture_size
    if compilation.cudagraph_capture_sizes == "auto":
        num_sizes = compilation.cudagraph_num_auto_sizes
        sizes = auto_capture_sizes(traffic.histogram, *limits, num_sizes=num_sizes, max_size=max_size)
        learned = f"learned from {traffic.num_learned} batches"
        return sizes, learned if traffic.num_learned else "the default grid, since no batches are known yet"
    sizes = default_capture_sizes(*limits, sizes=compilation.cudagraph_capture_sizes, max_size=max_size)
    return sizes, "the default grid" if compilation.cudagraph_capture_sizes is None else "the config"


def make_histogram_store(
    config: EngineConfig, model_config: ModelConfig, library: ArtifactLibrary, key: BundleKey
) -> HistogramStore | None:
    """A file per model shape, beside this user's artifacts, shared through them; None if nothing is to be kept."""
    if config.artifacts.store is None:
        if config.compilation_config.cudagraph_capture_sizes == "auto":
            logger.warning("cudagraph_capture_sizes auto forgets what it learns: artifacts.store is not set")
        return None
    shape = json.dumps(dataclasses.asdict(model_config), sort_keys=True, default=str)
    name = f"batches-{hashlib.sha256(shape.encode()).hexdigest()[:16]}.json"
    folder = artifacts_root() / "traffic"
    return SharedHistogramStore(FileHistogramStore(folder / name), host_name(folder), library, key)
