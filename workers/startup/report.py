"""A start as plain data: what the API returns, a file keeps, and the terminal draws. Seconds count from its origin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseRow:
    """A stretch of a start. Phases of different threads overlap.

    Attributes:
        end_s: None while it goes on.
        parent: Index of the phase that it is a part of, or None.
        num_bytes: Read or written in it; 0 where bytes do not matter.
        note: In a few words: why, or what came of it.
    """

    name: str
    start_s: float
    end_s: float | None
    parent: int | None = None
    num_bytes: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class LookupRow:
    """Something that was looked for in a cache.

    Attributes:
        what: ``artifacts``, say.
        is_hit: Whether it was there and good.
        reason: Of a miss.
        num_bytes: Of a hit.
        saved_s: What making it took when it was recorded, less what getting it took now.
    """

    what: str
    is_hit: bool
    reason: str = ""
    num_bytes: int = 0
    saved_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class StartupReport:
    """One start.

    Attributes:
        title: What was started.
        started_at: Wall time of the origin, ISO 8601 in UTC. For people; nothing is computed from it.
        host: Where.
        pid: Which process.
        process_age_s: How long the process had been there before the origin; 0 where they are the same.
        phases: In the order of their beginnings.
        lookups: Hits and misses.
        ready_s: When it could serve; None until then.
        first_token_s: When the first token had been made; None until then.
        swapped_s: When compiled pieces took the place of the eager model, if it served eagerly first.
    """

    title: str
    started_at: str
    host: str
    pid: int
    process_age_s: float
    phases: list[PhaseRow]
    lookups: list[LookupRow]
    ready_s: float | None
    first_token_s: float | None
    swapped_s: float | None = None

    @property
    def saved_s(self) -> float:
        """What all hits saved."""
        return sum(lookup.saved_s for lookup in self.lookups)

    def seconds(self, name: str) -> float:
        """Time that passed while any phase of that name went on."""
        total, reached = 0.0, float("-inf")
        for phase in sorted(self.phases, key=lambda phase: phase.start_s):
            if phase.name == name and phase.end_s is not None:
                total += max(phase.end_s - max(phase.start_s, reached), 0.0)
                reached = max(reached, phase.end_s)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**dataclasses.asdict(self), "saved_s": round(self.saved_s, 3)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` made.

        Raises:
            ValueError: It is something else.
        """
        try:
            fields = {name: value for name, value in data.items() if name != "saved_s"}
            fields["phases"] = [PhaseRow(**phase) for phase in data["phases"]]
            fields["lookups"] = [LookupRow(**lookup) for lookup in data["lookups"]]
            return cls(**fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not the account of a start: {error}") from None
