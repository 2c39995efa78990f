"""The adapter to Serve's autoscaler, with Serve's own context and settings but without a cluster."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.autoscaling.load import ReplicaLoad
from cluster.autoscaling.serve_policy import ServePolicy
from cluster.config import DeploymentConfig, ReplicaConfig
from cluster.messages import IngressLoad
from cluster.serving.application import _scale
from workers.errors import ConfigError

DEPLOYMENT = DeploymentID("engine-m", "app")


def context(
    loads: list[ReplicaLoad], state: dict[str, Any] | None = None, num_target: int = 0, now_s: float = 1000.0
) -> AutoscalingContext:
    """What Serve hands over when replicas have sent ``loads``, after something older."""
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for number, load in enumerate(loads):
        for name, value in load.to_metrics().items():
            series = [TimeStampedValue(1.0, 0.0), TimeStampedValue(2.0, float(value))]
            raw.setdefault(name, {})[ReplicaID(f"r{number}", DEPLOYMENT)] = series
    return AutoscalingContext(
        deployment_id=DEPLOYMENT, deployment_name="engine-m", app_name="app", current_num_replicas=len(loads),
        target_num_replicas=num_target or len(loads), running_replicas=[], total_num_requests=1.0,
        total_queued_requests=0.0, aggregated_metrics={}, raw_metrics=raw, capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9, policy_state=state or {}, last_scale_up_time=None, last_scale_down_time=None,
        current_time=now_s, config=None,
    )  # fmt: skip


def busy(start_s: float = 2.0, **ingress: float) -> ReplicaLoad:
    return ReplicaLoad(4, 0, 100, 0.01, 0.01, 0.0, start_s, IngressLoad(**ingress))


def test_the_newest_reports_decide_and_the_start_is_remembered() -> None:
    policy = ServePolicy("by_work", queue_target_s=2.0, utilization=0.8, start_s=60.0)
    wanted, state = policy(context([busy(3.0, output_tokens_per_s=150)]))
    assert (wanted, state["start_s"]) == (2, 3.0)
    wanted, state = policy(context([], state))
    assert (wanted, state["start_s"]) == (0, 3.0)
    assert policy(context([]))[1]["start_s"] == 60.0


def test_what_full_replicas_manage_is_remembered() -> None:
    policy = ServePolicy("by_work", queue_target_s=2.0, utilization=0.8, start_s=60.0)
    _, state = policy(context([busy(output_tokens_per_s=50)]))
    assert state["efficiency"] == 1.0
    full = dataclasses.replace(busy(num_held=3, output_tokens_per_s=50), efficiency=0.5)
    wanted, state = policy(context([full], state))
    assert (wanted, state["efficiency"]) == (2, 0.5)
    wanted, state = policy(context([busy(output_tokens_per_s=50)] * 2, state))
    assert (wanted, state["efficiency"]) == (2, 0.5), "two were needed, so one is not enough when they keep up"


def test_a_queue_that_stays_is_noticed_within_a_second() -> None:
    policy = ServePolicy("by_work", queue_target_s=2.0, utilization=0.8, start_s=2.0)

    def follow(held_tokens: list[float]) -> list[int]:
        """Decisions every 0.1 s, for one replica and so many tokens that wait."""
        state: dict[str, Any] = {}
        decisions = []
        for number, tokens in enumerate(held_tokens):
            load = busy(num_held=float(tokens > 0), held_output_tokens=tokens)
            wanted, state = policy(context([load], state, num_target=1, now_s=1000.0 + number / 10))
            decisions.append(wanted)
        return decisions

    assert follow([0.0] * 5 + [80.0] * 10) == [1] * 13 + [2] * 2
    assert follow([0.0] * 5 + [80.0 - 8 * number for number in range(10)]) == [1] * 15, "a burst that is worked off"
    long_ago = {"backlogs": [(990.0 + number, 1.0, 1) for number in range(10)]}
    _, state = policy(context([busy(num_held=1)], long_ago))
    assert [at_s for at_s, _, _ in state["backlogs"]] == [999.0, 1000.0], "only the last second is kept"


def test_serve_takes_the_settings_and_builds_the_policy() -> None:
    replicas = ReplicaConfig.model_validate(
        {"num_replicas": 0, "autoscaling": {"min_replicas": 0, "max_replicas": 4, "downscale_delay_s": 7}}
    )
    config = _scale(replicas)["autoscaling_config"]
    assert isinstance(config, AutoscalingConfig)
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 0, 4)
    assert (config.metrics_interval_s, config.look_back_period_s, config.upscale_delay_s) == (0.25, 0.5, 0.0)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(context([busy(output_tokens_per_s=150)]))[0] == 2
    assert _scale(ReplicaConfig(num_replicas=3)) == {"num_replicas": 3}


@pytest.mark.parametrize(
    ("replicas", "sentence"),
    [
        ({"num_replicas": 0}, "num_replicas must be at least 1 without autoscaling"),
        ({"autoscaling": {"min_replicas": 2, "max_replicas": 1}}, "min_replicas must not exceed max_replicas"),
        ({"autoscaling": {"min_replicas": 2, "max_replicas": 3}}, "must lie between min_replicas=2 and max_replicas=3"),
        ({"autoscaling": {"max_replicas": 3, "policy": "magic"}}, "policy"),
        ({"autoscaling": {"max_replica": 3}}, "did you mean 'max_replicas'?"),
    ],
)
def test_a_wrong_scaling_config_is_explained(replicas: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        DeploymentConfig.from_dict({"models": [{"name": "m", "engine": {"model": "m"}, "replicas": replicas}]})
    assert sentence in str(error.value)
