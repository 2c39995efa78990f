"""Capture sizes: the batch sizes, in tokens, that graphs are captured for.

Knows the defaults and how to check a user's list; knows nothing about keys, modes or traffic (see
``dispatcher`` and ``choose``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from workers.errors import ConfigError

logger = logging.getLogger(__name__)

#: Largest default capture size; above it kernels are long and the launch cost no longer shows.
DEFAULT_MAX_CAPTURE_SIZE = 512


def default_capture_sizes(
    max_num_seqs: int,
    max_num_batched_tokens: int,
    query_len: int = 1,
    sizes: Iterable[int] | None = None,
    max_size: int | None = None,
) -> list[int]:
    """The capture sizes in tokens, ascending and without duplicates.

    By default 1, 2, 4, then 8 to 248 by 8, then 256 to the maximum by 16 (vLLM's grid), where the maximum is
    ``min(2 * max_num_seqs * query_len, 512, max_num_batched_tokens)``. ``max_num_seqs`` is always among them when
    it is within the maximum, and so is a size that rounds up to ``max_num_seqs * query_len``: the fullest decode
    batch never falls off.

    Args:
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        query_len: Tokens that each request brings to a pure decode batch.
        sizes: A user's list instead of the default grid.
        max_size: A user's largest size.

    Raises:
        ConfigError: The list is empty or has entries below 1, or its largest entry is not ``max_size``.
    """
    assert max_num_seqs >= 1
    assert max_num_batched_tokens >= 1
    assert query_len >= 1
    if max_size is not None and max_size < 1:
        raise ConfigError(
            f"max_cudagraph_capture_size must be at least 1 (got {max_size}); "
            "to run without graphs, set cudagraph_mode to NONE.",
            param="max_cudagraph_capture_size",
        )
    if sizes is not None:
        return _checked_list(sizes, max_num_batched_tokens, max_size)
    return _default_grid(max_num_seqs, max_num_batched_tokens, query_len, max_size)


def uniform_capture_sizes(sizes: Iterable[int], max_num_seqs: int, query_len: int) -> list[int]:
    """Sizes of the graphs for uniform decode batches, in tokens, ascending.

    Each capture size is rounded up to a multiple of ``query_len``; none is above ``query_len * max_num_seqs``.
    """
    rounded = {-(-size // query_len) * query_len for size in sizes}
    return sorted(size for size in rounded if size <= query_len * max_num_seqs)


def _default_grid(max_num_seqs: int, max_num_batched_tokens: int, query_len: int, max_size: int | None) -> list[int]:
    largest = max_size or min(2 * max_num_seqs * query_len, DEFAULT_MAX_CAPTURE_SIZE)
    if max_size is not None and max_size > max_num_batched_tokens:
        logger.warning(
            "max_cudagraph_capture_size is lowered from %d to max_num_batched_tokens (%d)",
            max_size,
            max_num_batched_tokens,
        )
    largest = min(largest, max_num_batched_tokens)
    grid = {1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16), max_num_seqs}
    fullest = max_num_seqs * query_len
    if not any(fullest - query_len < size <= fullest for size in grid):
        grid.add(fullest)
    return sorted(size for size in grid if size <= largest)


def _checked_list(sizes: Iterable[int], max_num_batched_tokens: int, max_size: int | None) -> list[int]:
    wanted = sorted(set(sizes))
    if not wanted:
        raise ConfigError(
            "cudagraph_capture_sizes must not be empty; to run without graphs, set cudagraph_mode to NONE.",
            param="cudagraph_capture_sizes",
        )
    if wanted[0] < 1:
        raise ConfigError(
            f"cudagraph_capture_sizes must all be at least 1 (got {wanted[0]}).",
            param="cudagraph_capture_sizes",
        )
    kept = [size for size in wanted if size <= max_num_batched_tokens]
    if max_size is not None and max_size not in (wanted[-1], *kept[-1:]):
        raise ConfigError(
            f"cudagraph_capture_sizes ends at {wanted[-1]} but max_cudagraph_capture_size is {max_size}; "
            "give one of the two, or make them agree.",
            param="max_cudagraph_capture_size",
        )
    if not kept:
        raise ConfigError(
            f"every entry of cudagraph_capture_sizes is above max_num_batched_tokens ({max_num_batched_tokens}); "
            "give smaller sizes or raise max_num_batched_tokens.",
            param="cudagraph_capture_sizes",
        )
    if len(kept) < len(wanted):
        logger.warning(
            "cudagraph_capture_sizes above max_num_batched_tokens (%d) are dropped: %s",
            max_num_batched_tokens,
            wanted[len(kept) :],
        )
    return kept
