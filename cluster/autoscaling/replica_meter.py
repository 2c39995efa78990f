"""One replica's report for the autoscaler: its load, the cost of its tokens, and what the ingresses told it."""

from __future__ import annotations

import math

from cluster.admission.rate import Clock
from cluster.autoscaling.load import ReplicaLoad
from cluster.autoscaling.step_cost import StepCost
from cluster.messages import IngressLoad
from workers.engine.stats import EngineStats

#: An ingress that has not reported for this long is gone, or has nothing to report, in seconds.
_FORGET_S = 3.0
#: A replica must have been full for this long before it says how efficient it is, in seconds.
_LEAST_FULL_S = 0.5
#: Time over which the efficiency is averaged, in seconds of a full replica.
_EFFICIENCY_MEMORY_S = 3.0


class ReplicaMeter:
    """Follows one engine.

    Args:
        clock: Where time comes from.
        stats: Of the engine when it was ready.
        max_num_seqs: Its full batch.
        start_s: How long it took to become ready.
    """

    def __init__(self, clock: Clock, stats: EngineStats, max_num_seqs: int, start_s: float) -> None:
        self._clock = clock
        self._stats = stats
        self._max_num_seqs = max_num_seqs
        self._start_s = start_s
        self._cost = StepCost()
        self._full_since_s: float | None = None
        self._full_s = self._full_work_s = 0.0
        self._ingresses: dict[str, tuple[float, IngressLoad]] = {}

    def note_step(self, stats: EngineStats) -> None:
        """Take in the engine's counters after one or more steps."""
        before, self._stats = self._stats, stats
        num_steps = stats.num_steps - before.num_steps
        num_tokens = stats.num_computed_tokens - before.num_computed_tokens
        if num_steps > 0 and num_tokens > 0:
            self._cost.add(num_tokens, stats.busy_seconds - before.busy_seconds, num_steps)
            prompt_token_s, output_token_s = self._cost.token_s(self._max_num_seqs)
            num_generated = stats.num_generated_tokens - before.num_generated_tokens
            self._note_work(max(num_tokens - num_generated, 0) * prompt_token_s + num_generated * output_token_s)

    def _note_work(self, work_s: float) -> None:
        """Count work done since the step before, in seconds of full steps, if the replica was full all the time.

        Idle time would count against it: load that has just begun would look like a slow replica.
        """
        now_s = self._clock()
        if self._full_since_s is not None:
            seconds = now_s - self._full_since_s
            keep = math.exp(-seconds / _EFFICIENCY_MEMORY_S)
            self._full_s = self._full_s * keep + seconds
            self._full_work_s = self._full_work_s * keep + work_s
        scheduler = self._stats.scheduler
        is_full = scheduler.num_waiting > 0 or scheduler.num_running >= self._max_num_seqs
        self._full_since_s = now_s if is_full else None

    def note_ingress(self, ingress_id: str, load: IngressLoad) -> None:
        """Take in what an ingress reports."""
        self._ingresses[ingress_id] = (self._clock(), load)

    def load(self) -> ReplicaLoad:
        """The report."""
        scheduler = self._stats.scheduler
        prompt_token_s, output_token_s = self._cost.token_s(self._max_num_seqs)
        return ReplicaLoad(
            num_requests=scheduler.num_running + scheduler.num_waiting,
            prompt_tokens=scheduler.num_outstanding_tokens,
            output_tokens=scheduler.num_tokens_to_generate,
            prompt_token_s=prompt_token_s,
            output_token_s=output_token_s,
            efficiency=self._full_work_s / self._full_s if self._full_s >= _LEAST_FULL_S else 0.0,
            start_s=self._start_s,
            ingress=self._ingress_load(),
        )

    def _ingress_load(self) -> IngressLoad:
        oldest_s = self._clock() - _FORGET_S
        self._ingresses = {key: (at_s, load) for key, (at_s, load) in self._ingresses.items() if at_s >= oldest_s}
        loads = [load for _, load in self._ingresses.values()]
        if not loads:
            return IngressLoad()
        return IngressLoad(
            num_held=sum(load.num_held for load in loads),
            held_prompt_tokens=sum(load.held_prompt_tokens for load in loads),
            held_output_tokens=sum(load.held_output_tokens for load in loads),
            prompt_tokens_per_s=sum(load.prompt_tokens_per_s for load in loads),
            output_tokens_per_s=sum(load.output_tokens_per_s for load in loads),
            output_ratio=sum(load.output_ratio for load in loads) / len(loads),
            has_arrivals=max(load.has_arrivals for load in loads),
        )
