"""A plan for people: what the pieces are, who shares them, what they cost; as data, text and a picture.

Knows plans; compiles and traces nothing.
"""

from __future__ import annotations

import dataclasses
import html
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from workers.compile.plan import OpStep, PieceStep, Plan

#: Fill colours of unique pieces, in the order of their first call.
_COLOURS = ("#8fb8de", "#f4b183", "#a9d18e", "#ffd966", "#c9a6e4", "#f4a6a6")
_WIDTH, _ROW, _GAP = 760, 26, 6


@dataclasses.dataclass(frozen=True, slots=True)
class PieceSummary:
    """One unique piece.

    Attributes:
        num_calls: Piece calls of one forward pass that share it.
        ops: Calls of each operation in it, most frequent first.
        builds: One per format and size: ``format``, ``size``, ``seconds``, ``num_bytes``.
    """

    key: str
    num_calls: int
    num_ops: int
    ops: Mapping[str, int]
    builds: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class PlanSummary:
    """A plan without its stitching.

    Attributes:
        split_ops: Calls of each split op.
        passes: Matches of each pass.
    """

    num_piece_calls: int
    num_weights: int
    trace_seconds: float
    pieces: list[PieceSummary]
    split_ops: Mapping[str, int]
    passes: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def summarize(plan: Plan) -> PlanSummary:
    """What there is to know about a plan at a glance."""
    calls = Counter(plan.piece_calls())
    pieces = []
    for key in calls:
        record = plan.pieces[key]
        builds = [
            {"format": build.format, "size": build.size, "seconds": build.seconds, "num_bytes": build.num_bytes}
            for build in record.builds
        ]
        pieces.append(PieceSummary(key, calls[key], sum(record.ops.values()), record.ops, builds))
    ops = Counter(step.op for step in plan.steps if isinstance(step, OpStep))
    return PlanSummary(sum(calls.values()), len(plan.weights), plan.trace_seconds, pieces, dict(ops), plan.passes)


def split_svg(plan: Plan) -> str:
    """The split as a picture: one row per piece call or split op, one colour per unique piece."""
    colours = {key: _COLOURS[index % len(_COLOURS)] for index, key in enumerate(dict.fromkeys(plan.piece_calls()))}
    rows = list(_rows(plan, colours))
    height = len(rows) * (_ROW + _GAP) + _GAP
    body = "\n".join(
        f'<rect x="{_GAP}" y="{_GAP + index * (_ROW + _GAP)}" width="{_WIDTH - 2 * _GAP}" height="{_ROW}" rx="4" '
        f'fill="{colour}"/>\n<text x="{3 * _GAP}" y="{_GAP + index * (_ROW + _GAP) + 18}">{html.escape(label)}</text>'
        for index, (label, colour) in enumerate(rows)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="monospace" font-size="13">\n{body}\n</svg>\n'
    )


def _rows(plan: Plan, colours: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    num_calls = 0
    for step in plan.steps:
        if isinstance(step, PieceStep):
            ops = plan.pieces[step.piece].ops
            frequent = ", ".join(f"{count} {name}" for name, count in list(ops.items())[:4])
            yield f"{num_calls}: piece {step.piece[:8]}  {sum(ops.values())} ops: {frequent}", colours[step.piece]
            num_calls += 1
        else:
            constants = [str(arg["const"]) for arg in step.args if isinstance(arg, dict)]
            yield f"{step.op}({', '.join(constants)})", "#e8e8e8"
