"""Every replica's engine counters as Prometheus metrics with ``model`` and ``replica`` labels.

One scrape of any ingress covers all replicas: the ingress asks them for their statistics and renders them here.
Knows statistics and metric names; how they were fetched is the fleet's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from workers.engine.stats import EngineStats

_LABELS = ("model", "replica")

#: Metric name -> (help, value). Names follow vLLM's where it has the same quantity.
_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "warmgraph_num_requests_running": ("Requests in the batch.", lambda s: s.scheduler.num_running),
    "warmgraph_num_requests_waiting": ("Requests queued for the batch.", lambda s: s.scheduler.num_waiting),
    "warmgraph_kv_blocks_free": ("KV blocks that no request holds.", lambda s: s.scheduler.num_free_blocks),
    "warmgraph_kv_blocks": ("KV blocks that requests can hold.", lambda s: s.scheduler.num_total_blocks),
    "warmgraph_outstanding_tokens": (
        "Known tokens whose KV is still to be computed.",
        lambda s: s.scheduler.num_outstanding_tokens,
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "warmgraph_engine_steps": ("Engine steps.", lambda s: s.num_steps),
    "warmgraph_engine_busy_seconds": ("Seconds spent in engine steps.", lambda s: s.busy_seconds),
    "warmgraph_engine_prompt_tokens": ("Prompt tokens accepted.", lambda s: s.num_prompt_tokens),
    "warmgraph_engine_generation_tokens": ("Tokens generated.", lambda s: s.num_generated_tokens),
    "warmgraph_engine_requests_finished": ("Requests that ended by themselves.", lambda s: s.num_finished),
    "warmgraph_engine_requests_aborted": ("Requests aborted.", lambda s: s.num_aborted),
    "warmgraph_prefix_cache_queries": (
        "Tokens looked up in the prefix cache.",
        lambda s: s.scheduler.num_prefix_query_tokens,
    ),
    "warmgraph_prefix_cache_hits": (
        "Tokens found in the prefix cache.",
        lambda s: s.scheduler.num_prefix_hit_tokens,
    ),
    "warmgraph_preemptions": ("Requests that lost their KV blocks.", lambda s: s.scheduler.num_preemptions),
    "warmgraph_artifact_bytes_fetched": (
        "Bytes of compiled artifacts read from the store.",
        lambda s: s.artifacts.bytes_fetched,
    ),
    "warmgraph_artifact_bytes_published": (
        "Bytes of compiled artifacts written to the store.",
        lambda s: s.artifacts.bytes_published,
    ),
    "warmgraph_artifact_seconds_saved": (
        "What the artifacts that were found took whoever built them.",
        lambda s: s.artifacts.seconds_saved,
    ),
    "warmgraph_artifact_build_failures": (
        "Compilations that failed and were remembered.",
        lambda s: s.artifacts.num_build_failures,
    ),
    "warmgraph_artifact_eager_starts": (
        "Models that run eagerly because a build failed or was wrong.",
        lambda s: s.artifacts.num_eager_starts,
    ),
    "warmgraph_compile_graph_breaks": (
        "Traces that failed because the model is not one graph.",
        lambda s: s.compilation.num_graph_breaks,
    ),
    "warmgraph_compile_recompiles_refused": (
        "Batches that would have needed a compilation after start, and got an error.",
        lambda s: s.compilation.num_recompiles_refused,
    ),
    "warmgraph_compile_traces": ("Traces of a model by Dynamo.", lambda s: s.compilation.num_traces),
    "warmgraph_compile_builds": (
        "Programs and pieces that went through a compiler.",
        lambda s: s.compilation.num_compiled,
    ),
    "warmgraph_compile_loads": ("Compiled pieces loaded.", lambda s: s.compilation.num_loaded),
}
#: Metric name -> (help, label, counts by the label's value).
_LABELLED_COUNTERS: dict[str, tuple[str, str, Callable[[EngineStats], Mapping[str, int]]]] = {
    "warmgraph_artifact_lookups": ("Lookups of compiled bundles.", "outcome", lambda s: s.artifacts.lookups),
    "warmgraph_artifact_misses": (
        "Misses, by the factors in which the nearest bundle differs.",
        "factors",
        lambda s: s.artifacts.misses,
    ),
    "warmgraph_artifact_refusals": (
        "Manifests and blobs that were refused, and bundles that were put in quarantine.",
        "reason",
        lambda s: s.artifacts.refusals,
    ),
    "warmgraph_artifact_store_failures": (
        "Calls to the artifact store that failed.",
        "direction",
        lambda s: s.artifacts.store_failures,
    ),
}

#: Statistics by model name and replica id.
StatsByReplica = Mapping[str, Mapping[str, EngineStats]]


class _EngineCollector(Collector):
    def __init__(self, stats: StatsByReplica) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        for name, (text, value) in _GAUGES.items():
            yield self._fill(GaugeMetricFamily(name, text, labels=_LABELS), value)
        for name, (text, value) in _COUNTERS.items():
            yield self._fill(CounterMetricFamily(name, text, labels=_LABELS), value)
        for name, (text, label, counts) in _LABELLED_COUNTERS.items():
            yield self._fill_by_label(CounterMetricFamily(name, text, labels=(*_LABELS, label)), counts)

    def _fill(
        self, family: GaugeMetricFamily | CounterMetricFamily, value: Callable[[EngineStats], float]
    ) -> GaugeMetricFamily | CounterMetricFamily:
        for model, replicas in self._stats.items():
            for replica, stats in replicas.items():
                family.add_metric((model, replica), value(stats))
        return family

    def _fill_by_label(
        self, family: CounterMetricFamily, counts: Callable[[EngineStats], Mapping[str, int]]
    ) -> CounterMetricFamily:
        for model, replicas in self._stats.items():
            for replica, stats in replicas.items():
                for value, count in counts(stats).items():
                    family.add_metric((model, replica, value), count)
        return family


def render_engine_metrics(stats: StatsByReplica) -> bytes:
    """The statistics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_EngineCollector(stats))
    return generate_latest(registry)
