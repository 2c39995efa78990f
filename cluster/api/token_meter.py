"""What is counted for every single token: the tokens, and the time since the one before.

prometheus_client's own metrics take a lock for every number and walk the buckets one by one, 10 us for a token. These
are plain integers, since the tokens of a process are counted, and scraped, on its one event loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)


class ModelTokens:
    """The tokens of one model."""

    __slots__ = ("gap_counts", "gap_sum_s", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = 0
        self.gap_counts = [0] * (len(_GAP_BUCKETS) + 1)
        self.gap_sum_s = 0.0

    def note_gap(self, seconds: float) -> None:
        """A chunk came this long after the one before."""
        self.gap_counts[bisect_left(_GAP_BUCKETS, seconds)] += 1
        self.gap_sum_s += seconds


class TokenMeter(Collector):
    """Every model's tokens, for a registry."""

    def __init__(self) -> None:
        self._models: dict[str, ModelTokens] = {}

    def for_model(self, name: str) -> ModelTokens:
        """The tokens of one model."""
        return self._models.setdefault(name, ModelTokens())

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        tokens = CounterMetricFamily("warmgraph_generation_tokens", "Tokens generated", labels=["model_name"])
        gaps = HistogramMetricFamily(
            "warmgraph_inter_token_latency_seconds", "Between chunks of a choice", labels=["model_name"]
        )
        for name, model in self._models.items():
            tokens.add_metric([name], model.num_tokens)
            buckets, num = [], 0
            for bound, count in zip((*_GAP_BUCKETS, float("inf")), model.gap_counts, strict=True):
                num += count
                buckets.append((floatToGoString(bound), float(num)))  # type: ignore[no-untyped-call]  # its own gap
            gaps.add_metric([name], buckets, model.gap_sum_s)
        yield tokens
        yield gaps
