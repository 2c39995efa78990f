"""The key of a captured graph. Knows nothing about tensors or about which graphs exist."""

from __future__ import annotations

from typing import NamedTuple

from workers.modes import CUDAGraphMode


class BatchDescriptor(NamedTuple):
    """The shape of a (padded) batch, as far as a captured graph depends on it.

    A named tuple, since every wrapper looks its graph up by it at every call.

    Attributes:
        num_tokens: Tokens, padding included.
        num_reqs: Most requests that the graph serves, or None where it does not depend on them (PIECEWISE).
        uniform: Whether every request brings the same number of tokens; such a graph serves pure decode batches
            only.
    """

    num_tokens: int
    num_reqs: int | None = None
    uniform: bool = False


#: A graph is known by its runtime mode (FULL or PIECEWISE) and its batch.
GraphKey = tuple[CUDAGraphMode, BatchDescriptor]


def describe_key(key: GraphKey) -> str:
    """``FULL graph of 8 tokens (uniform)``, for messages."""
    mode, descriptor = key
    return f"{mode.name} graph of {descriptor.num_tokens} tokens{' (uniform)' if descriptor.uniform else ''}"
