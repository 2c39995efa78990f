"""Writes down a start while it happens. One per engine, made as early as possible; every thread may write.

Phases that one thread opens inside each other become a tree; those of another thread stand beside it. Knows nothing of
what happens in a phase.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from workers.startup.process import FIRST_IMPORT_S, process_started_s
from workers.startup.report import LookupRow, PhaseRow, StartupReport


@dataclasses.dataclass(slots=True)
class Phase:
    """A phase under way; whoever is in it may fill in ``num_bytes`` and ``note``."""

    name: str
    start_s: float
    parent: int | None
    end_s: float | None = None
    num_bytes: int = 0
    note: str = ""


class StartupAccount:
    """See the module.

    Args:
        title: What is started.
        origin_s: Where seconds count from, on ``clock``; None is now.
        clock: Monotonic seconds.
    """

    def __init__(
        self, title: str = "", origin_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title = title
        self._clock = clock
        now = clock()
        self._origin_s = now if origin_s is None else origin_s
        self._started_at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=now - self._origin_s)
        self._lock = threading.Lock()
        self._open = threading.local()
        self._phases: list[Phase] = []
        self._lookups: list[LookupRow] = []
        self._moments: dict[str, float] = {}

    @classmethod
    def of_process(cls, title: str = "") -> Self:
        """From the start of this process, if its first engine is being made; else from now."""
        global _process_is_accounted
        if _process_is_accounted:
            return cls(title)
        _process_is_accounted = True
        started_s = process_started_s()
        account = cls(title, started_s)
        account.add("process", started_s, FIRST_IMPORT_S)
        account.add("imports", FIRST_IMPORT_S, time.monotonic())
        return account

    @contextlib.contextmanager
    def phase(self, name: str, note: str = "") -> Iterator[Phase]:
        """Everything inside the ``with`` block is called ``name``; it ends even where the block raises."""
        stack: list[int] = self._open.__dict__.setdefault("stack", [])
        phase = Phase(name, self._clock(), stack[-1] if stack else None, note=note)
        with self._lock:
            self._phases.append(phase)
            stack.append(len(self._phases) - 1)
        try:
            yield phase
        finally:
            stack.pop()
            phase.end_s = self._clock()

    def add(self, name: str, start_s: float, end_s: float, *, num_bytes: int = 0, note: str = "") -> None:
        """A phase that is over, with times on the account's clock."""
        stack: list[int] = self._open.__dict__.get("stack", [])
        with self._lock:
            self._phases.append(Phase(name, start_s, stack[-1] if stack else None, end_s, num_bytes, note))

    def looked_up(self, lookup: LookupRow) -> None:
        """Something was looked for."""
        with self._lock:
            self._lookups.append(lookup)

    def mark(self, moment: str) -> None:
        """``ready``, ``first_token`` or ``swapped`` has happened; the first time counts."""
        self._moments.setdefault(moment, self._clock())

    def report(self) -> StartupReport:
        """The account so far."""
        with self._lock:
            phases, lookups = [dataclasses.replace(phase) for phase in self._phases], list(self._lookups)
        order = sorted(range(len(phases)), key=lambda index: phases[index].start_s)
        place = {index: position for position, index in enumerate(order)}
        rows = [self._row(phases[index], place) for index in order]
        return StartupReport(
            title=self.title,
            started_at=self._started_at.isoformat(timespec="milliseconds"),
            host=socket.gethostname(),
            pid=os.getpid(),
            process_age_s=round(max(self._origin_s - process_started_s(), 0.0), 3),
            phases=rows,
            lookups=lookups,
            ready_s=self._moment("ready"),
            first_token_s=self._moment("first_token"),
            swapped_s=self._moment("swapped"),
        )

    def _row(self, phase: Phase, place: dict[int, int]) -> PhaseRow:
        end_s = None if phase.end_s is None else self._since_origin(phase.end_s)
        parent = None if phase.parent is None else place[phase.parent]
        return PhaseRow(phase.name, self._since_origin(phase.start_s), end_s, parent, phase.num_bytes, phase.note)

    def _moment(self, name: str) -> float | None:
        at_s = self._moments.get(name)
        return None if at_s is None else self._since_origin(at_s)

    def _since_origin(self, at_s: float) -> float:
        return round(at_s - self._origin_s, 4)


_process_is_accounted = False
