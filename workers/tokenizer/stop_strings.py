"""Finds stop strings in text that arrives piece by piece.

An Aho-Corasick automaton ("Efficient string matching", CACM 1975) reads every character once, so the result does
not depend on how the text was cut into pieces. Its state's depth is exactly how much of the text's end may still
become a stop string, that is, what must be held back. Knows nothing about tokens.
"""

from __future__ import annotations

import functools
import re
from collections import deque


class StopAutomaton:
    """All stop strings of a request, compiled; immutable and shared. State 0 has read nothing of any of them."""

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        self.depth = [0]
        #: Longest stop string that ends in this state.
        self.ending: list[str | None] = [None]
        self._next: list[dict[str, int]] = [{}]
        for stop in stop_strings:
            self._insert(stop)
        self._fallback = [0] * len(self.depth)
        self._link()
        #: Finds the next character at which a stop string can begin.
        self.search_start = re.compile("|".join({re.escape(stop[0]) for stop in stop_strings})).search

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while (following := self._next[state].get(char)) is None:
            if state == 0:
                return 0
            state = self._fallback[state]
        return following

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self.depth)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.ending.append(None)
            state = self._next[state][char]
        self.ending[state] = stop

    def _link(self) -> None:
        """Breadth first: where to go on from when the next character does not fit."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            if self.ending[state] is None:
                self.ending[state] = self.ending[self._fallback[state]]
            for char, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], char)
                queue.append(child)


@functools.lru_cache(maxsize=256)
def compile_stop_strings(stop_strings: tuple[str, ...]) -> StopAutomaton:
    """The automaton of these strings; requests of one client tend to share them."""
    return StopAutomaton(stop_strings)


class StopStringMatcher:
    """Passes text on, except what may be the beginning of a stop string.

    The stop string that is complete first wins; of several that end at the same character the longest.

    Args:
        stop_strings: At least one.
        include_in_output: Pass the stop string on too; then nothing needs to be held back.
    """

    def __init__(self, stop_strings: tuple[str, ...], include_in_output: bool) -> None:
        self._automaton = compile_stop_strings(stop_strings)
        self._include = include_in_output
        self._state = 0
        self._held = ""

    def feed(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """Read ``text``.

        Args:
            text: What follows the text read so far.
            may_stop: False passes over stop strings that end in ``text``.

        Returns:
            Text to pass on, and the stop string that was found, if any: then the text ends there.
        """
        automaton, state, position = self._automaton, self._state, 0
        while position < len(text):
            if state == 0:
                start = automaton.search_start(text, position)
                if start is None:
                    break
                position = start.start()
            state = automaton.step(state, text[position])
            position += 1
            stop = automaton.ending[state]
            if stop is not None and may_stop:
                return self._cut(text[:position], stop), stop
        self._state = state
        text = self._held + text
        num_held = 0 if self._include else automaton.depth[state]
        split = len(text) - num_held
        self._held = text[split:]
        return text[:split], None

    def flush(self) -> str:
        """The text held back; nothing follows it, so it is no stop string."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _cut(self, text: str, stop: str) -> str:
        text = self._held + text
        self._held, self._state = "", 0
        return text if self._include else text[: len(text) - len(stop)]
