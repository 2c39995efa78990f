"""What padding buys and costs: fewer captures, and rows that compute nothing.

A pure function from a load and capture sizes to rows.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

from workers.analysis.load import Load
from workers.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class PaddingRow:
    """One batch size of the load.

    Attributes:
        size: Real tokens.
        count: Batches of this size.
        graph_size: The graph that serves it, or None above the largest: such a batch runs unpadded without a graph.
    """

    size: int
    count: int
    graph_size: int | None

    @property
    def num_padded(self) -> int:
        """Padding rows of one batch."""
        return 0 if self.graph_size is None else self.graph_size - self.size


@dataclasses.dataclass(frozen=True, slots=True)
class PaddingReport:
    """A load under a list of capture sizes.

    Attributes:
        sizes: Capture sizes, ascending.
        rows: One per batch size of the load, ascending.
        captures_with_padding: Different graphs that the load takes.
        captures_without_padding: Graphs that the same batches would need if each ran at its own size.
        padded_share: Padding rows among all rows that run, over the whole load.
        graphless_share: Batches above the largest size.
    """

    sizes: list[int]
    rows: list[PaddingRow]
    captures_with_padding: int
    captures_without_padding: int
    padded_share: float
    graphless_share: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [dataclasses.asdict(row) | {"num_padded": row.num_padded} for row in self.rows]
        return dataclasses.asdict(self) | {"rows": rows}


def analyze_padding(load: Load, sizes: Sequence[int]) -> PaddingReport:
    """Serve a load with graphs of ``sizes``, each batch padded up to the smallest that holds it.

    Raises:
        ConfigError: There are no sizes, or one is below 1.
    """
    if not sizes or min(sizes) < 1:
        raise ConfigError("give capture sizes of at least 1, e.g. 1,2,4,8.", param="sizes")
    ascending = sorted(set(sizes))
    rows = [PaddingRow(size, count, _graph_size(ascending, size)) for size, count in sorted(load.items())]
    served = [row for row in rows if row.graph_size is not None]
    num_real = sum(row.size * row.count for row in rows)
    num_padded = sum(row.num_padded * row.count for row in rows)
    num_batches = sum(row.count for row in rows)
    return PaddingReport(
        sizes=ascending,
        rows=rows,
        captures_with_padding=len({row.graph_size for row in served}),
        captures_without_padding=len(served),
        padded_share=num_padded / (num_real + num_padded),
        graphless_share=sum(row.count for row in rows if row.graph_size is None) / num_batches,
    )


def _graph_size(ascending: Sequence[int], size: int) -> int | None:
    index = bisect.bisect_left(ascending, size)
    return ascending[index] if index < len(ascending) else None
