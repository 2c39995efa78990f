"""What the artifact layer did is a metric with the reason as a label; what the compile layer did is one too."""

from __future__ import annotations

import dataclasses

from cluster.serving.engine_metrics import render_engine_metrics
from tests.artifact_cases import KEY, PLAN, make_library
from workers.artifacts.key import BundleKey
from workers.artifacts.signing import SignerKey
from workers.compile.counters import CompileCounters
from workers.engine.stats import EngineStats
from workers.scheduler.output import SchedulerStats

NOTHING_SCHEDULED = SchedulerStats(**dict.fromkeys(SchedulerStats.__dataclass_fields__, 0))


def test_misses_name_their_factors() -> None:
    library = make_library(signer=SignerKey.generate())
    library.publish(KEY, [PLAN])
    library.open(KEY)
    library.open(BundleKey({**KEY.graph, "dtype": "float32"}))
    stats = EngineStats(NOTHING_SCHEDULED, 0, 0, 0, 0, 0, 0, 0.0, (), True, library.counters.snapshot())
    text = render_engine_metrics({"m": {"r": stats}}).decode()
    assert 'warmgraph_artifact_lookups_total{model="m",outcome="hit",replica="r"} 1.0' in text
    assert 'warmgraph_artifact_misses_total{factors="dtype",model="m",replica="r"} 1.0' in text
    assert f'warmgraph_artifact_bytes_published_total{{model="m",replica="r"}} {len(PLAN.data)}.0' in text
    library.open(KEY)
    assert stats.artifacts.lookups == {"hit": 1, "absent": 1}


def test_graph_breaks_and_recompiles_are_counted() -> None:
    counters = CompileCounters(num_traces=1, num_compiled=3, num_loaded=3)
    stats = EngineStats(NOTHING_SCHEDULED, 0, 0, 0, 0, 0, 0, 0.0, (), False, compilation=counters.snapshot())
    counters.num_graph_breaks, counters.num_recompiles_refused = 1, 2
    later = dataclasses.replace(stats, compilation=counters.snapshot())
    text = render_engine_metrics({"m": {"r": stats, "s": later}}).decode()
    for replica, breaks, recompiles in (("r", 0, 0), ("s", 1, 2)):
        assert f'warmgraph_compile_graph_breaks_total{{model="m",replica="{replica}"}} {breaks}.0' in text
        assert f'warmgraph_compile_recompiles_refused_total{{model="m",replica="{replica}"}} {recompiles}.0' in text
        assert f'warmgraph_compile_builds_total{{model="m",replica="{replica}"}} 3.0' in text
