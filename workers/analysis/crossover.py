"""When a capture has paid for itself.

A pure model. Without a graph a step costs ``num_ops`` launches; with one it costs a replay; the capture costs once.
After n steps the graph has paid if ``capture + n * replay <= n * num_ops * launch``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from workers.errors import ConfigError

#: Op counts that the command shows: one op, a toy, a small model, a layer stack at batch 1.
DEFAULT_NUM_OPS = (1, 4, 32, 300)


@dataclasses.dataclass(frozen=True, slots=True)
class StepCosts:
    """What the launches of one step cost, in one unit for all.

    Attributes:
        num_ops: Ops of a step.
        eager: A step that launches each op.
        replay: A step that replays a graph of them.
        capture: Capturing the graph, once.
        unit: Of the costs: ``launches`` or ``us``.
    """

    num_ops: int
    eager: float
    replay: float
    capture: float
    unit: str = "launches"


@dataclasses.dataclass(frozen=True, slots=True)
class CrossoverRow:
    """One set of costs, and what follows.

    Attributes:
        steps_to_pay_off: Steps after which the capture has paid for itself, or None: it never does.
        asymptotic_speedup: Cost of a step without the graph over that with it, once the capture is forgotten.
        explanation: The same in words.
    """

    costs: StepCosts
    steps_to_pay_off: int | None
    asymptotic_speedup: float
    explanation: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def analyze_crossover(costs: StepCosts) -> CrossoverRow:
    """When the capture pays, and what it gains in the long run."""
    saved = costs.eager - costs.replay
    steps = max(1, math.ceil(costs.capture / saved)) if saved > 0 else None
    return CrossoverRow(costs, steps, costs.eager / costs.replay, _explain(costs, saved, steps))


def unit_costs(num_ops: Iterable[int], capture_factors: Sequence[int] = (1, 5)) -> list[StepCosts]:
    """Costs in units of one launch: a replay is one, a capture ``factor * num_ops``.

    Raises:
        ConfigError: A number of ops is below 1.
    """
    rows = []
    for ops in num_ops:
        if ops < 1:
            raise ConfigError(f"a step has at least 1 op (got {ops}).", param="num_ops")
        rows += [StepCosts(ops, float(ops), 1.0, float(ops * factor)) for factor in capture_factors]
    return rows


def _explain(costs: StepCosts, saved: float, steps: int | None) -> str:
    eager, replay = _amount(costs.eager, costs.unit), _amount(costs.replay, costs.unit)
    if steps is None:
        how = "as much as" if saved == 0 else "more than"
        return f"A replay costs {how} the step it replaces ({replay} against {eager}), so it never pays."
    capture = _amount(costs.capture, costs.unit)
    return (
        f"A replay costs {replay} where the ops cost {eager}, so each step saves {_amount(saved, costs.unit)}; the"
        f" capture costs {capture} and has paid for itself after {steps} {'step' if steps == 1 else 'steps'}."
    )


def _amount(value: float, unit: str) -> str:
    if unit == "launches":
        return f"{value:g} {'launch' if value == 1 else 'launches'}"
    return f"{value:.1f} {unit}"
