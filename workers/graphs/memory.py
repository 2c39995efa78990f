"""Memory of captured graphs: what each added, the total, and what to do when the next would not fit.

Bookkeeping only: the graph backend measures, the driver of the captures asks here before and reports after each
one.
"""

from __future__ import annotations

import dataclasses
import enum
import logging

from workers.errors import ConfigError
from workers.graphs.descriptor import BatchDescriptor, GraphKey, describe_key
from workers.modes import CUDAGraphMode

logger = logging.getLogger(__name__)


class MemoryPolicy(enum.StrEnum):
    """What to do with a graph that does not fit: leave it out, or stop with an error."""

    SHRINK = "shrink"
    ERROR = "error"


@dataclasses.dataclass(frozen=True, slots=True)
class SkippedGraph:
    """A graph that was left out, and why."""

    key: GraphKey
    reason: str


class GraphMemoryBudget:
    """Decides, one capture at a time, whether a graph fits.

    Graphs share one pool, so the largest one pays for most of what the smaller ones use. The estimate for the next
    capture follows from that: as much as the last capture of its mode added (a smaller batch reuses the pool), and
    for a batch larger than any captured in that mode, the mode's bytes in proportion to its tokens.

    Args:
        limit_bytes: Most bytes for all graphs, or None for no limit.
        policy: SHRINK leaves a graph out and goes on with smaller ones; ERROR raises.
    """

    def __init__(self, limit_bytes: int | None = None, policy: MemoryPolicy = MemoryPolicy.SHRINK) -> None:
        self.limit_bytes = limit_bytes
        self.policy = policy
        self.skipped: list[SkippedGraph] = []
        self._bytes: dict[GraphKey, int] = {}
        self._held = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of every graph that is held, and what given-up graphs left behind in the pool."""
        return max(sum(self._bytes.values()), self._held)

    def bytes_by_key(self) -> dict[GraphKey, int]:
        """Bytes that capturing each graph added, in capture order."""
        return dict(self._bytes)

    def estimate(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> int:
        """Bytes that capturing this graph is expected to add; 0 for the first of its mode."""
        same = [(key[1].num_tokens, size) for key, size in self._bytes.items() if key[0] is mode]
        if not same:
            return 0
        largest = max(num_tokens for num_tokens, _ in same)
        added = same[-1][1] if len(same) > 1 else 0
        if descriptor.num_tokens <= largest:
            return added
        return max(added, sum(size for _, size in same) * (descriptor.num_tokens - largest) // largest)

    def admit(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> bool:
        """Whether to capture this graph.

        Raises:
            ConfigError: It is not expected to fit and the policy is ERROR.
        """
        return self._check(mode, descriptor, self.estimate(mode, descriptor), "is expected to add")

    def record(self, mode: CUDAGraphMode, descriptor: BatchDescriptor, num_bytes: int) -> bool:
        """Take note of a capture that added ``num_bytes``; False if the graph must be given up.

        Raises:
            ConfigError: The limit is passed and the policy is ERROR.
        """
        if not self._check(mode, descriptor, num_bytes, "added"):
            return False
        self._bytes[mode, descriptor] = num_bytes
        return True

    def note_held(self, num_bytes: int) -> None:
        """Take note of what the backend holds: a pool keeps the memory of a graph that was given up."""
        self._held = num_bytes

    def clear(self) -> None:
        """Forget every graph, for a weight reload."""
        self._held = 0
        self._bytes.clear()
        self.skipped.clear()

    def _check(self, mode: CUDAGraphMode, descriptor: BatchDescriptor, num_bytes: int, verb: str) -> bool:
        if self.limit_bytes is None or self.total_bytes + num_bytes <= self.limit_bytes:
            return True
        reason = (
            f"the {describe_key((mode, descriptor))} {verb} {_mib(num_bytes)} to the {_mib(self.total_bytes)} of "
            f"the others, above the limit of {_mib(self.limit_bytes)}"
        )
        if self.policy is MemoryPolicy.ERROR:
            raise ConfigError(
                f"{reason}; raise cudagraph_memory_limit_bytes or lower max_cudagraph_capture_size.",
                param="cudagraph_memory_limit_bytes",
            )
        logger.warning("left out: %s", reason)
        self.skipped.append(SkippedGraph((mode, descriptor), reason))
        return False


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"
