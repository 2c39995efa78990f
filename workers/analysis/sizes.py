"""The capture sizes that a config comes to, for measuring: of ``auto``, the default grid, since no traffic is known."""

from __future__ import annotations

from workers.config import EngineConfig
from workers.graphs.sizes import default_capture_sizes


def configured_sizes(config: EngineConfig) -> list[int]:
    """In tokens, ascending.

    Raises:
        ConfigError: The config's list is empty or contradicts its largest size.
    """
    compilation = config.compilation_config
    wanted = compilation.cudagraph_capture_sizes
    return default_capture_sizes(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        sizes=None if wanted == "auto" else wanted,
        max_size=compilation.max_cudagraph_capture_size,
    )
