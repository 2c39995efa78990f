"""A limit per minute as a bucket that refills steadily."""

from __future__ import annotations

from cluster.admission.rate import Clock


class TokenBucket:
    """Holds at most one minute's worth.

    Whoever wants more than a whole bucket needs a full one and leaves it in debt: the limit holds on average, and no
    amount is impossible.

    Args:
        per_minute: Refill, and capacity.
        clock: Where time comes from.
    """

    def __init__(self, per_minute: float, clock: Clock) -> None:
        assert per_minute > 0
        self.per_minute = per_minute
        self._clock = clock
        self._level = per_minute
        self._updated_s = clock()

    def wait_s(self, amount: float) -> float:
        """Seconds until ``amount`` may be spent; 0 if it may be spent now."""
        self._refill()
        missing = min(amount, self.per_minute) - self._level
        return max(0.0, missing * 60.0 / self.per_minute)

    def spend(self, amount: float) -> None:
        """Take ``amount`` out; a negative amount gives back what was not used."""
        self._refill()
        self._level = min(self._level - amount, self.per_minute)

    def _refill(self) -> None:
        now_s = self._clock()
        self._level = min(self.per_minute, self._level + (now_s - self._updated_s) * self.per_minute / 60.0)
        self._updated_s = now_s
