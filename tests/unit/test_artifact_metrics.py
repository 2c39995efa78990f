"""What the artifact layer did is a metric with the reason as a label."""

from __future__ import annotations

from cluster.serving.engine_metrics import render_engine_metrics
from tests.artifact_cases import KEY, PLAN, make_library
from workers.artifacts.key import BundleKey
from workers.artifacts.signing import SignerKey
from workers.engine.stats import EngineStats
from workers.scheduler.output import SchedulerStats


def test_misses_name_their_factors() -> None:
    library = make_library(signer=SignerKey.generate())
    library.publish(KEY, [PLAN])
    library.open(KEY)
    library.open(BundleKey({**KEY.graph, "dtype": "float32"}))
    scheduler = SchedulerStats(**dict.fromkeys(SchedulerStats.__dataclass_fields__, 0))
    stats = EngineStats(scheduler, 0, 0, 0, 0, 0, 0, 0.0, (), True, library.counters.snapshot())
    text = render_engine_metrics({"m": {"r": stats}}).decode()
    assert 'warmgraph_artifact_lookups_total{model="m",outcome="hit",replica="r"} 1.0' in text
    assert 'warmgraph_artifact_misses_total{factors="dtype",model="m",replica="r"} 1.0' in text
    assert f'warmgraph_artifact_bytes_published_total{{model="m",replica="r"}} {len(PLAN.data)}.0' in text
    library.open(KEY)
    assert stats.artifacts.lookups == {"hit": 1, "absent": 1}
