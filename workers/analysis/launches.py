"""How many launches a step costs, from how the model is cut into segments.

A pure model: FULL is one launch; PIECEWISE is one per captured segment and one per op of every eager segment; eager is
one per op. Knows nothing about how the numbers of a real model are found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from workers.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A run of ops between two split points, or a split op.

    Attributes:
        name: For people.
        num_ops: Launches it costs when every op is launched by itself.
        is_captured: Whether PIECEWISE records it; what is not runs eagerly.
    """

    name: str
    num_ops: int
    is_captured: bool


@dataclasses.dataclass(frozen=True, slots=True)
class LaunchCounts:
    """Launches per step in each form."""

    eager: int
    piecewise: int
    full: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def count_launches(segments: Sequence[Segment]) -> LaunchCounts:
    """What the model predicts for these segments."""
    return LaunchCounts(
        eager=sum(segment.num_ops for segment in segments),
        piecewise=sum(1 if segment.is_captured else segment.num_ops for segment in segments if segment.num_ops),
        full=1 if segments else 0,
    )


def synthetic_segments(num_ops: int, split_at: Sequence[int]) -> list[Segment]:
    """A model of ``num_ops`` ops, numbered from 0, in which those at ``split_at`` are split points.

    ``synthetic_segments(10, [5])`` is five captured ops, one eager op and four captured ops.

    Raises:
        ConfigError: There are no ops, or a split point is not one of them.
    """
    if num_ops < 1:
        raise ConfigError(f"a model has at least 1 op (got {num_ops}).", param="ops")
    wrong = [index for index in split_at if not 0 <= index < num_ops]
    if wrong:
        raise ConfigError(
            f"split point {wrong[0]} is not an op: ops are numbered from 0 to {num_ops - 1}.", param="split"
        )
    segments, start = [], 0
    for index in sorted(set(split_at)):
        if index > start:
            segments.append(Segment(_range(start, index - 1), index - start, is_captured=True))
        segments.append(Segment(_range(index, index), 1, is_captured=False))
        start = index + 1
    if start < num_ops:
        segments.append(Segment(_range(start, num_ops - 1), num_ops - start, is_captured=True))
    return segments


def _range(first: int, last: int) -> str:
    return f"op {first}" if first == last else f"ops {first}-{last}"
