"""How often a capture may come between two steps of a busy engine. Knows time and nothing about graphs."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Most of a busy engine's time that captures may take.
BUSY_SHARE = 0.05

#: Shortest pause between two captures, in seconds; also how often a busy engine looks for one to make.
MIN_PAUSE_S = 0.5


class CapturePacer:
    """Spaces captures so that batches wait for one at a time, and for no more than a share of the time.

    Args:
        share: Of the time, above 0; by default ``BUSY_SHARE``.
        min_pause_s: Shortest pause, the one before the first capture included; by default ``MIN_PAUSE_S``.
        on_wait: Told how long each capture took, in seconds.
        clock: Monotonic, in seconds.
    """

    def __init__(
        self,
        share: float | None = None,
        min_pause_s: float | None = None,
        *,
        on_wait: Callable[[float], None] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._share = BUSY_SHARE if share is None else share
        self._min_pause_s = MIN_PAUSE_S if min_pause_s is None else min_pause_s
        assert 0 < self._share <= 1
        self._on_wait = on_wait
        self._clock = clock
        self._due_at = clock() + self._min_pause_s

    @property
    def is_due(self) -> bool:
        """Whether it is time for a capture; asked at every step, so it costs next to nothing."""
        return self._clock() >= self._due_at

    def run(self, capture: Callable[[], bool]) -> bool:
        """Call ``capture`` if it is time to, and then pause for as long as makes what it took its share.

        Args:
            capture: Makes one capture and returns whether there was one to make.

        Returns:
            Whether a capture was made.
        """
        started = self._clock()
        if started < self._due_at:
            return False
        was_made = capture()
        ended = self._clock()
        seconds = ended - started
        self._due_at = ended + max(self._min_pause_s, seconds / self._share - seconds)
        if was_made:
            self._on_wait(seconds)
        return was_made
