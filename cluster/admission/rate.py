"""How fast something happens now: an average that forgets."""

from __future__ import annotations

import math
from collections.abc import Callable

#: Returns seconds that never go back, as ``time.monotonic`` does.
Clock = Callable[[], float]


class RateMeter:
    """Amounts per second, over about the last ``memory_s`` seconds.

    Args:
        clock: Where time comes from.
        memory_s: An amount loses 63 % of its weight in this time.
    """

    def __init__(self, clock: Clock, memory_s: float = 10.0) -> None:
        self._clock = clock
        self._memory_s = memory_s
        self._started_s = self._updated_s = clock()
        self._weighted = 0.0

    def add(self, amount: float) -> None:
        """Note that ``amount`` happened now."""
        self._decay()
        self._weighted += amount

    def per_s(self) -> float:
        """The rate now; 0 if nothing ever happened."""
        self._decay()
        age_s = self._updated_s - self._started_s
        # The weights of all moments since the start sum up to this; a young meter has seen less than its memory.
        seconds = self._memory_s * (1.0 - math.exp(-age_s / self._memory_s))
        return self._weighted / max(seconds, 0.1)

    def _decay(self) -> None:
        now_s = self._clock()
        self._weighted *= math.exp(-(now_s - self._updated_s) / self._memory_s)
        self._updated_s = now_s
