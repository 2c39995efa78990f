"""The memory plan: arithmetic, what is kept of it, and when it applies."""

from __future__ import annotations

import json

import pytest

from workers.artifacts.key import BundleKey
from workers.artifacts.library import Addition, ArtifactLibrary
from workers.artifacts.manifest import Kind
from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.runner.memory_plan import MemoryPlan, MemoryPlanShelf, kv_cache_bytes

GIB = 1 << 30
PLAN = MemoryPlan(peak_activations=2 * GIB, graph_bytes=GIB, free_bytes=60 * GIB)
KEY = BundleKey(graph={"model": "a"}, capture={}, runtime={})


def test_the_cache_gets_what_is_left_of_the_share() -> None:
    # 16 GiB of weights and 1 of the process; the engine may fill 72, so 55 are left, and 3 are spoken for.
    assert kv_cache_bytes(0.9, 80 * GIB, 63 * GIB, 16 * GIB, PLAN) == 52 * GIB


def test_what_others_use_is_not_taken_from_the_share() -> None:
    # Another engine fills 36 GiB; this one may fill as much.
    alone = kv_cache_bytes(0.45, 80 * GIB, 63 * GIB, 16 * GIB, PLAN)
    assert kv_cache_bytes(0.45, 80 * GIB, 27 * GIB, 16 * GIB, PLAN) == alone == 16 * GIB


def test_a_share_that_leaves_nothing_says_what_to_change() -> None:
    with pytest.raises(ConfigError, match="raise it, or lower max_num_batched_tokens"):
        kv_cache_bytes(0.2, 80 * GIB, 63 * GIB, 16 * GIB, PLAN)


def test_a_device_that_others_fill_is_reported_before_it_runs_out() -> None:
    with pytest.raises(ConfigError, match=r"only 27\.0 of 80\.0 GiB are free .* lower it, or free the device"):
        kv_cache_bytes(0.9, 80 * GIB, 27 * GIB, 16 * GIB, PLAN)


def test_a_plan_survives_being_written() -> None:
    assert MemoryPlan.from_bytes(PLAN.to_bytes()) == PLAN
    assert PLAN.applies(60 * GIB)
    assert not PLAN.applies(60 * GIB - 1)


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"graph_bytes": -1}, {"graph_bytes": 1.5}, {"graph_bytes": True}, {"more": 1}]
)
def test_what_is_not_a_plan_is_measured_again(change: dict[str, object]) -> None:
    assert MemoryPlan.from_bytes(json.dumps(json.loads(PLAN.to_bytes()) | change).encode()) is None
    assert MemoryPlan.from_bytes(b"\xff{") is None
    assert MemoryPlan.from_bytes(b"[]") is None


def test_plans_lie_beside_the_pieces_by_what_they_depend_on() -> None:
    library = ArtifactLibrary.in_memory()
    config = EngineConfig(model="m")
    shelf = MemoryPlanShelf(library, KEY, config)
    shelf.save(PLAN)
    assert shelf.load() is None  # no bundle to lie beside
    library.publish(KEY, [Addition(Kind.PLAN, "plan", b"{}")])
    shelf.save(PLAN)
    assert shelf.load() == PLAN
    other = config.model_copy(update={"max_num_batched_tokens": 16})
    assert MemoryPlanShelf(library, KEY, other).load() is None
    unrelated = config.model_copy(update={"gpu_memory_utilization": 0.5})
    assert MemoryPlanShelf(library, KEY, unrelated).load() == PLAN
