"""The routing benchmark in small: what each policy is for shows on simulated replicas."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks.routing import PROFILES, Load, simulate
from cluster.routing.registry import POLICIES

LOAD = Load(num_requests=300, share=1.0, num_prefixes=24, prefix_tokens=512)


@functools.cache
def figures(policy: str) -> dict[str, Any]:
    return simulate(POLICIES[policy], LOAD, PROFILES["h200-1b"], num_replicas=4)


@pytest.mark.parametrize("policy", ["prefix_affinity", "balanced"])
def test_prefixes_are_found_where_they_are(policy: str) -> None:
    baseline, result = figures("round_robin"), figures(policy)
    assert result["hit_rate"] > baseline["hit_rate"] + 0.1
    assert result["ttft_ms_p99"] < baseline["ttft_ms_p99"]
    assert result["inter_token_ms"] < baseline["inter_token_ms"]


def test_captured_rows_are_used() -> None:
    assert figures("capture_aware")["padding"] < 0.9 * figures("round_robin")["padding"]


def test_a_run_repeats_itself() -> None:
    assert simulate(POLICIES["balanced"], LOAD, PROFILES["h200-1b"], num_replicas=4) == figures("balanced")
