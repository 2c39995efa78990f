"""Numbers of a load test: pure functions of its timings."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Sequence
from typing import Any

from cluster.bench.client import Timing

_PERCENTILES = (50, 90, 95, 99)


def summarize(timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    """Everything about a run: latencies in milliseconds, throughput over the whole of it, errors by kind."""
    good = [timing for timing in timings if timing.error is None]
    begun = [timing for timing in good if timing.token_s]
    gaps = [after - before for timing in begun for before, after in itertools.pairwise(timing.token_s)]
    num_prompt_tokens = sum(timing.num_prompt_tokens for timing in good)
    num_tokens = sum(timing.num_tokens for timing in good)
    return {
        "requests": len(timings),
        "errors": dict(collections.Counter(timing.error for timing in timings if timing.error is not None)),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(good) / seconds, 2),
        "prompt_tokens": num_prompt_tokens,
        "cached_tokens": sum(timing.num_cached_tokens for timing in good),
        "output_tokens": num_tokens,
        "output_tokens_per_s": round(num_tokens / seconds, 1),
        "ttft_ms": distribution([timing.token_s[0] - timing.started_s for timing in begun]),
        "inter_token_ms": distribution(gaps),
        "e2e_ms": distribution([timing.finished_s - timing.started_s for timing in good]),
    }


def distribution(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum in milliseconds; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    numbers = {"mean": math.fsum(ordered) / len(ordered)}
    for percent in _PERCENTILES:
        numbers[f"p{percent}"] = ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
    numbers["max"] = ordered[-1]
    return {name: round(1e3 * value, 2) for name, value in numbers.items()}
