"""Captures of a busy engine take no more than their share of the time."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from workers.graphs.pacing import CapturePacer


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def capture(self, seconds: float, was_made: bool = True) -> bool:
        self.now += seconds
        return was_made


def test_pauses() -> None:
    clock, waits = _Clock(), list[float]()
    pacer = CapturePacer(0.1, 1.0, on_wait=waits.append, clock=clock)
    assert not pacer.is_due
    assert not pacer.run(lambda: clock.capture(9.0))
    assert clock.now == 0
    clock.now = 1.0
    assert pacer.is_due
    assert pacer.run(lambda: clock.capture(0.5))
    clock.now = 5.9
    assert not pacer.run(lambda: clock.capture(9.0))
    clock.now = 6.0
    assert not pacer.run(lambda: clock.capture(0.0, was_made=False))  # looked for one and found none
    clock.now = 6.9
    assert not pacer.run(lambda: clock.capture(9.0))
    clock.now = 7.0
    assert pacer.run(lambda: clock.capture(0.25))
    assert waits == [0.5, 0.25]


@given(st.floats(0.01, 1.0), st.integers())
def test_the_share_holds_for_captures_and_steps_of_any_length(share: float, seed: int) -> None:
    rng = random.Random(seed)
    clock, waits = _Clock(), list[float]()
    pacer = CapturePacer(share, 0.01, on_wait=waits.append, clock=clock)
    for _ in range(500):
        clock.now += rng.random() / 10  # a step
        pacer.run(lambda: clock.capture(rng.random()))
    # The last capture has not had its pause yet.
    assert 0 < sum(waits) <= share * clock.now + max(waits)
