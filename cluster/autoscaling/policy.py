"""Autoscaling policies: pure functions from a model's load to the number of replicas that it needs.

They look at work: tokens that wait or come in, times what a token costs, is seconds of one replica. Delays before
shrinking, bounds and the start from zero are Serve's to apply. Knows nothing about Ray.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable

from cluster.autoscaling.load import ModelLoad
from workers.errors import ConfigError

#: Shrinking needs this much more room than growing, so that the number does not swing.
_SHRINK_ROOM = 0.8


@dataclasses.dataclass(frozen=True, slots=True)
class ScalingGoals:
    """What the operator wants.

    Attributes:
        queue_target_s: Time within which a queue should be worked off once the replicas started for it are ready.
        utilization: Share of a replica's full speed that steady load may use.
    """

    queue_target_s: float
    utilization: float


#: ``policy(load, goals) -> replicas``; 0 says that nobody needs the model now.
ScalingPolicy = Callable[[ModelLoad, ScalingGoals], int]


def by_work(load: ModelLoad, goals: ScalingGoals) -> int:
    """As many as keep up with what comes in, and work off what waits.

    While new replicas start the present ones go on: only what will still wait when the new ones are ready is theirs to
    do, within ``queue_target_s``. So a short queue starts none if a start takes long, and the more the shorter it is.
    As long as anything waits nobody is taken away, those that are still starting included.

    The average of what comes in takes seconds to follow. A queue that does not shrink although every replica is full
    says sooner that more comes in than they can do, but not how much more: it is a reason for one more replica.
    """
    ingress = load.ingress
    num_requests = sum(r.num_requests for r in load.replicas) + ingress.num_held
    measured = [r for r in load.replicas if r.output_token_s > 0]
    if not measured:
        return max(load.num_target, 1) if num_requests else 0
    prompt_s = sum(r.prompt_token_s for r in measured) / len(measured) / load.efficiency
    output_s = sum(r.output_token_s for r in measured) / len(measured) / load.efficiency
    arriving = ingress.prompt_tokens_per_s * prompt_s + ingress.output_tokens_per_s * output_s
    if not num_requests and not ingress.has_arrivals:
        return 0
    steady = arriving / goals.utilization
    if math.ceil(steady) < load.num_replicas:
        steady = min(steady / _SHRINK_ROOM, load.num_replicas)
    if load.growth_tokens_per_s is not None:
        coming = load.num_replicas + load.growth_tokens_per_s * output_s
        steady = max(steady, min(coming / goals.utilization, load.num_replicas + 1))
    needed = max(1, math.ceil(max(steady, _for_queue(load, goals, arriving, prompt_s, output_s)) - 1e-9))
    # One that has just become ready has not had its share yet: too early to say that it is not needed.
    return max(needed, load.num_replicas) if len(load.replicas) < load.num_replicas else needed


def _for_queue(load: ModelLoad, goals: ScalingGoals, arriving: float, prompt_s: float, output_s: float) -> float:
    """Replicas, as a fraction, for what waits: none if every request is being worked on."""
    ingress = load.ingress
    if not ingress.num_held:
        return 0.0
    prompt_tokens = sum(r.prompt_tokens for r in load.replicas) + ingress.held_prompt_tokens
    output_tokens = sum(r.output_tokens for r in load.replicas) * ingress.output_ratio + ingress.held_output_tokens
    work_s = prompt_tokens * prompt_s + output_tokens * output_s
    num_running = max(load.num_replicas, 1)
    left_s = work_s + (arriving - num_running) * load.start_s
    more = max(0.0, left_s - num_running * goals.queue_target_s) / goals.queue_target_s
    return max(num_running + more, load.num_target)


POLICIES: dict[str, ScalingPolicy] = {"by_work": by_work}


def load_scaling_policy(name: str) -> ScalingPolicy:
    """The policy of that name, or the function at ``package.module:function``.

    Raises:
        ConfigError: There is none.
    """
    if name in POLICIES:
        return POLICIES[name]
    module_name, _, attribute = name.partition(":")
    try:
        policy: ScalingPolicy = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"autoscaling.policy: {name!r} is none of {', '.join(POLICIES)} and cannot be imported: {error}.",
            param="autoscaling.policy",
        ) from None
    return policy
