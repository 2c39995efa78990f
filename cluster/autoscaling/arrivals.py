"""What comes in at one ingress, in tokens per second, and how much of it is really generated."""

from __future__ import annotations

import math

from cluster.admission.rate import Clock, RateMeter
from cluster.messages import IngressLoad

#: A burst of this many seconds' worth counts as load that stays.
_MEMORY_S = 10.0
#: A request came in lately if it did so within this time, in seconds: no report misses it.
_LATELY_S = 1.0
#: Rates below this count as nothing, in tokens per second.
_NOTHING = 0.1
#: Weight of the first guess, that requests generate all they may.
_PRIOR_TOKENS = 1000.0


class ArrivalMeter:
    """Follows the requests of one model.

    Args:
        clock: Where time comes from.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last_s = -math.inf
        self._prompt = RateMeter(clock, _MEMORY_S)
        self._output = RateMeter(clock, _MEMORY_S)
        self._allowed = self._generated = _PRIOR_TOKENS

    @property
    def output_ratio(self) -> float:
        """What requests generate of their ``max_tokens``, on average; 1 until some have ended."""
        return self._generated / self._allowed

    def arrive(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """A request came in."""
        self._last_s = self._clock()
        self._prompt.add(num_prompt_tokens)
        self._output.add(max_tokens)

    def finish(self, max_tokens: int, num_generated: int) -> None:
        """A request ended by itself."""
        self._allowed += max_tokens
        self._generated += num_generated
        if self._allowed > 100 * _PRIOR_TOKENS:  # forget slowly
            self._allowed, self._generated = self._allowed / 2, self._generated / 2

    def load(self, num_held: int, held_prompt_tokens: int, held_output_tokens: int) -> IngressLoad:
        """The report, given what waits."""
        ratio = self.output_ratio
        return IngressLoad(
            num_held=num_held,
            held_prompt_tokens=held_prompt_tokens,
            held_output_tokens=held_output_tokens * ratio,
            prompt_tokens_per_s=_or_nothing(self._prompt.per_s()),
            output_tokens_per_s=_or_nothing(self._output.per_s() * ratio),
            output_ratio=ratio,
            has_arrivals=float(self._clock() - self._last_s <= _LATELY_S),
        )


def _or_nothing(rate: float) -> float:
    return rate if rate >= _NOTHING else 0.0
