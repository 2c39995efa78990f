"""Choosing capture sizes from traffic: which k sizes waste the least work on padding.

A pure function from a histogram to sizes, by exact dynamic programming over the sizes seen. Knows nothing about
graphs or about where the histogram comes from.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from workers.errors import ConfigError
from workers.graphs.histogram import BatchHistogram
from workers.graphs.sizes import default_capture_sizes

#: Sizes chosen by ``auto``; the default grid has 51 up to 512.
DEFAULT_NUM_SIZES = 16

#: What ``auto`` allows for batches unlike those seen: this share of the traffic, and no fewer than so many batches,
#: spread evenly over the default sizes. A histogram of a few batches so gives sizes that cover everything.
UNSEEN_SHARE = 0.01
MIN_UNSEEN_BATCHES = 100.0

#: More different batch sizes are grouped for ``auto``: the exact programme takes memory with their square.
MAX_DIFFERENT_SIZES = 1024

Work = Callable[[int], float]


def padded_work(sizes: Sequence[int], counts: Mapping[int, float], work: Work = float) -> float:
    """Work spent on padding: ``sum(count * (work(padded) - work(size)))`` over the batches that sizes serve.

    Args:
        sizes: Capture sizes, ascending. Batches above the last run unpadded and cost nothing here.
        counts: Number of batches by size.
        work: Cost of a batch of n tokens; by default n.
    """
    total = 0.0
    for size, count in counts.items():
        index = bisect.bisect_left(sizes, size)
        if index < len(sizes):
            total += count * (work(sizes[index]) - work(size))
    return total


def choose_capture_sizes(
    counts: Mapping[int, float], num_sizes: int, required: Iterable[int] = (), work: Work = float
) -> list[int]:
    """At most ``num_sizes`` sizes that serve every batch in ``counts`` with the least padded work.

    Exact: some optimal choice uses only sizes that occur (lowering a size to the next one that occurs never adds
    work), so ``best[k][j]``, the least work of serving everything up to the j-th size with k sizes of which it is
    the last, is the minimum over i < j of ``best[k - 1][i] + count(i < n <= j) * work(j)``. O(num_sizes * m^2)
    for m different sizes. Of several optimal choices, one with the fewest sizes.

    Args:
        counts: Number of batches by size; sizes at least 1.
        num_sizes: Most sizes to choose.
        required: Sizes that must be among them.
        work: Cost of a batch of n tokens, not falling with n; by default n.

    Raises:
        ConfigError: The required sizes and the one for the largest batch are more than ``num_sizes``.
    """
    seen = sorted({size for size, count in counts.items() if count > 0} | set(required))
    if not seen:
        return []
    assert seen[0] >= 1
    forced = {*required, seen[-1]}
    if len(forced) > num_sizes:
        raise ConfigError(
            f"{num_sizes} capture sizes are too few: {sorted(forced)} are needed in any case.",
            param="cudagraph_num_auto_sizes",
        )
    costs = _interval_costs(seen, counts, forced, work)
    num_steps = min(num_sizes, len(seen))
    best, choices = _solve(costs, num_steps)
    steps = int(np.argmin(best))  # the first minimum: fewest sizes
    index, chosen = len(seen), []
    for step in range(steps, 0, -1):
        chosen.append(seen[index - 1])
        index = int(choices[step][index])
    assert index == 0
    return chosen[::-1]


def auto_capture_sizes(
    histogram: BatchHistogram,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    query_len: int = 1,
    *,
    num_sizes: int = DEFAULT_NUM_SIZES,
    max_size: int | None = None,
) -> list[int]:
    """Capture sizes for ``cudagraph_capture_sizes: auto``.

    Batches above the largest default size (or ``max_size``) are left to run without a graph. That largest size and
    the one for the fullest decode batch are always chosen, so that sizes not seen yet are served by padding.
    Without any traffic to learn from, the default grid.

    Args:
        histogram: The batches seen so far.
        max_num_seqs: Most requests in a step.
        max_num_batched_tokens: Most tokens in a step.
        query_len: Tokens that each request brings to a pure decode batch.
        num_sizes: Most sizes to choose.
        max_size: A user's largest size.

    Raises:
        ConfigError: ``num_sizes`` is below the number of sizes that are always chosen, two at most.
    """
    grid = default_capture_sizes(max_num_seqs, max_num_batched_tokens, query_len, max_size=max_size)
    largest = grid[-1]
    seen = histogram.token_counts(query_len)
    counts = {size: count for size, count in seen.items() if 1 <= size <= largest}
    if not counts:
        return grid
    fullest = max_num_seqs * query_len
    required = {largest, fullest} if fullest <= largest else {largest}
    return choose_capture_sizes(_grouped(_with_unseen(counts, grid), required), num_sizes, required)


def _with_unseen(counts: Mapping[int, int], grid: Sequence[int]) -> dict[int, float]:
    """The batches seen, and some at every default size."""
    allowance = max(MIN_UNSEEN_BATCHES, UNSEEN_SHARE * sum(counts.values())) / len(grid)
    return {size: counts.get(size, 0) + (allowance if size in grid else 0.0) for size in {*counts, *grid}}


def _grouped(counts: Mapping[int, float], required: Collection[int]) -> dict[int, float]:
    """The same batches at no more than about ``MAX_DIFFERENT_SIZES`` sizes, rounded up where there are more."""
    if len(counts) <= MAX_DIFFERENT_SIZES:
        return dict(counts)
    largest = max(counts)
    step = -(-largest // MAX_DIFFERENT_SIZES)
    grouped: dict[int, float] = collections.defaultdict(float)
    for size, count in counts.items():
        # Not over a required size, which serves what rounding would carry past it.
        ceiling = min((other for other in required if other >= size), default=largest)
        grouped[min(-(-size // step) * step, ceiling)] += count
    return grouped


def _interval_costs(
    seen: list[int], counts: Mapping[int, float], forced: set[int], work: Work
) -> npt.NDArray[np.float64]:
    """``costs[i, j]``: padded work of serving ``seen[i:j]`` with a graph of ``seen[j - 1]``, or infinity."""
    num = len(seen)
    weights = np.array([counts.get(size, 0) for size in seen], dtype=np.float64)
    loads = np.array([work(size) for size in seen], dtype=np.float64)
    batches = np.concatenate([[0.0], np.cumsum(weights)])
    useful = np.concatenate([[0.0], np.cumsum(weights * loads)])
    skipped = np.concatenate([[0], np.cumsum([size in forced for size in seen])])
    costs = np.full((num + 1, num + 1), np.inf)
    for j in range(1, num + 1):
        padded = (batches[j] - batches[:j]) * loads[j - 1] - (useful[j] - useful[:j])
        # An interval may end at a forced size but not run over one.
        costs[:j, j] = np.where(skipped[:j] == skipped[j - 1], padded, np.inf)
    return costs


def _solve(
    costs: npt.NDArray[np.float64], num_steps: int
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.int64]]]:
    """Least cost of covering everything with exactly k intervals, for k up to ``num_steps``, and the choices."""
    num = costs.shape[0]
    row = np.full(num, np.inf)
    row[0] = 0.0
    totals = [row[-1]]
    choices: list[npt.NDArray[np.int64]] = [np.zeros(num, dtype=np.int64)]
    for _ in range(num_steps):
        candidates = row[:, None] + costs
        choices.append(np.argmin(candidates, axis=0))
        row = np.min(candidates, axis=0)
        totals.append(row[-1])
    return np.array(totals), choices
