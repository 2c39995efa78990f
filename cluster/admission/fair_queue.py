"""A queue in which everybody gets a fair share: deficit round robin over flows, by cost.

Each flow that waits gets a turn after the other. A turn adds ``quantum`` times the flow's weight to what it may spend,
and serves the flow's items, first come first served, while it can pay for them. Over time flows that wait are served in
proportion to their weights, whatever the size and number of their items. Knows costs, not what they stand for.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT", bound=Hashable)


@dataclasses.dataclass(slots=True)
class _Flow(Generic[ItemT]):
    weight: float
    costs: dict[ItemT, float] = dataclasses.field(default_factory=dict)
    credit: float = 0.0
    has_turn: bool = False


class FairQueue(Generic[ItemT]):
    """Items of several flows.

    Args:
        quantum: Cost that a turn pays for, of a flow of weight 1.

    Attributes:
        cost: Of all items that wait.
    """

    def __init__(self, quantum: float) -> None:
        assert quantum > 0
        self.cost = 0.0
        self._quantum = quantum
        self._flows: dict[str, _Flow[ItemT]] = {}
        self._ring: deque[str] = deque()
        self._flow_of: dict[ItemT, str] = {}

    def __len__(self) -> int:
        return len(self._flow_of)

    def push(self, flow_name: str, item: ItemT, cost: float, weight: float = 1.0) -> None:
        """Put an item, which must not be here yet, at the end of its flow."""
        assert item not in self._flow_of
        assert cost >= 0
        assert weight > 0
        flow = self._flows.get(flow_name)
        if flow is None:
            flow = self._flows[flow_name] = _Flow(weight)
            self._ring.append(flow_name)
        flow.weight = weight
        flow.costs[item] = cost
        self._flow_of[item] = flow_name
        self.cost += cost

    def pop(self) -> ItemT | None:
        """Take the next item, or None if nobody waits."""
        while self._ring:
            name = self._ring[0]
            flow = self._flows[name]
            if not flow.has_turn:
                flow.has_turn = True
                flow.credit += self._quantum * flow.weight
            item, cost = next(iter(flow.costs.items()))
            if cost <= flow.credit:
                flow.credit -= cost
                self._remove(item)
                return item
            flow.has_turn = False
            self._ring.rotate(-1)
        return None

    def discard(self, item: ItemT) -> bool:
        """Take out an item that does not want to wait any more; False if it is not here."""
        is_here = item in self._flow_of
        if is_here:
            self._remove(item)
        return is_here

    def give_back(self, flow_name: str, cost: float) -> None:
        """Credit a flow with cost that it was charged and did not cause. Only a flow that waits has credit to keep."""
        flow = self._flows.get(flow_name)
        if flow is not None:
            flow.credit += cost

    def _remove(self, item: ItemT) -> None:
        name = self._flow_of.pop(item)
        flow = self._flows[name]
        self.cost -= flow.costs.pop(item)
        if not flow.costs:  # who does not wait saves nothing up
            del self._flows[name]
            self._ring.remove(name)
