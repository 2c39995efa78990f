"""The adapter to Ray Serve's autoscaler: reads replicas' metrics, asks the policy.

Serve calls it about ten times per second and applies bounds and delays to the answer. It asks for one replica by itself
when a call waits while there is none. Serve pickles this module by value: it must not hold state; what has to be
remembered is handed back as Serve's policy state.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from ray.serve.config import AutoscalingContext

from cluster.autoscaling.load import ModelLoad, ReplicaLoad
from cluster.autoscaling.policy import ScalingGoals, load_scaling_policy

logger = logging.getLogger("ray.serve")

IMPORT_PATH = "cluster.autoscaling.serve_policy:ServePolicy"


#: Below this a measurement is rather of a replica that has not begun.
_MIN_EFFICIENCY = 0.2
#: Time over which a queue must not shrink before it counts as more than the replicas can do, in seconds.
_GROWTH_S = 0.75

#: When a backlog was seen (seconds), its tokens, and how many replicas worked on it; oldest first.
_Backlogs = list[tuple[float, float, int]]


class ServePolicy:
    """What Serve calls.

    Args:
        policy: Name or import path of a :data:`~cluster.autoscaling.policy.ScalingPolicy`.
        queue_target_s, utilization: See :class:`ScalingGoals`.
        start_s: How long a start takes, as long as none was measured.
    """

    def __init__(self, policy: str, queue_target_s: float, utilization: float, start_s: float) -> None:
        self._policy = load_scaling_policy(policy)
        self._goals = ScalingGoals(queue_target_s, utilization)
        self._start_s = start_s

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted, and what to remember."""
        loads = _read_loads(context)
        start_s = max((load.start_s for load in loads), default=context.policy_state.get("start_s", self._start_s))
        efficiency = max((load.efficiency for load in loads), default=0.0)
        if efficiency:
            efficiency = min(max(efficiency, _MIN_EFFICIENCY), 1.0)
        else:
            efficiency = context.policy_state.get("efficiency", 1.0)
        load = ModelLoad(context.current_num_replicas, context.target_num_replicas, loads, start_s, efficiency)
        backlogs = _follow_backlog(context, load)
        load = dataclasses.replace(load, growth_tokens_per_s=_growth_per_s(backlogs))
        wanted = self._policy(load, self._goals)
        if wanted != context.policy_state.get("wanted"):
            logger.info(
                "%s: the load asks for %d replicas, %d run; %.0f requests wait, %.0f prompt and %.0f output tokens/s",
                context.deployment_name,
                wanted,
                load.num_replicas,
                load.ingress.num_held,
                load.ingress.prompt_tokens_per_s,
                load.ingress.output_tokens_per_s,
            )
        return wanted, {"start_s": start_s, "efficiency": efficiency, "wanted": wanted, "backlogs": backlogs}


def _follow_backlog(context: AutoscalingContext, load: ModelLoad) -> _Backlogs:
    """What the backlog was over the last :data:`_GROWTH_S`, and now; empty while nothing waits."""
    if not load.ingress.num_held or context.current_time is None:
        return []
    now_s, num = context.current_time, load.num_replicas
    before: _Backlogs = [seen for seen in context.policy_state.get("backlogs", ()) if seen[2] == num]
    while len(before) > 1 and now_s - before[1][0] >= _GROWTH_S:
        del before[0]
    return [*before, (now_s, load.backlog_tokens, num)]


def _growth_per_s(backlogs: _Backlogs) -> float | None:
    """How fast the backlog grew, in tokens per second; None if it was not seen for long enough."""
    if not backlogs or backlogs[-1][0] - backlogs[0][0] < _GROWTH_S:
        return None
    return (backlogs[-1][1] - backlogs[0][1]) / (backlogs[-1][0] - backlogs[0][0])


def _read_loads(context: AutoscalingContext) -> list[ReplicaLoad]:
    """The newest report of every running replica that has sent one."""
    newest: dict[Any, dict[str, float]] = {}
    for name, by_replica in (context.raw_metrics or {}).items():
        for replica_id, series in by_replica.items():
            if series:
                newest.setdefault(replica_id, {})[name] = series[-1].value
    loads = (ReplicaLoad.from_metrics(metrics) for metrics in newest.values())
    return [load for load in loads if load is not None]
