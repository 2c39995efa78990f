"""A plan for people: what the pieces are, who shares them, what they cost; as data, text and a picture.

Knows plans; compiles and traces nothing.
"""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from workers.compile.plan import OpStep, PieceStep, Plan

#: Fill colours of unique pieces, in the order of their first call.
_COLOURS = ("#8fb8de", "#f4b183", "#a9d18e", "#ffd966", "#c9a6e4", "#f4a6a6")
#: Of the picture, in pixels: all of it, a box, a line of text, the room above and below text, between boxes.
_WIDTH, _BOX, _LINE, _PADDING, _GAP = 780, 680, 18, 10, 16
#: Characters that fit into a box.
_COLUMNS = 80
#: Steps that a folded run has at most.
_LONGEST_RUN = 6


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
    """The split as a picture: pieces and split ops from top to bottom, one colour per unique piece, repeats folded."""
    colours = {key: _COLOURS[index % len(_COLOURS)] for index, key in enumerate(dict.fromkeys(plan.piece_calls()))}
    summaries = {piece.key: piece for piece in summarize(plan).pieces}
    shapes: list[str] = []
    y = _GAP
    for run, count in _fold([step.piece if isinstance(step, PieceStep) else step.op for step in plan.steps]):
        top = y
        for label in run:
            piece = summaries.get(label)
            lines = [label] if piece is None else _describe(piece)
            height = _LINE * len(lines) + _PADDING
            if y > _GAP:
                shapes.append(_arrow(y - _GAP, y))
            shapes.append(_box(y, height, lines, "#e8e8e8" if piece is None else colours[label]))
            y += height + _GAP
        if count > 1:
            shapes.append(_bracket(top, y - _GAP, count))
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}" '
        f'font-family="monospace" font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _fold(labels: Sequence[str]) -> Iterator[tuple[Sequence[str], int]]:
    """Runs of labels, and how often each follows itself: ``a b c b c d`` is a, (b c) twice, d."""
    start = 0
    while start < len(labels):
        runs = [(_repeats(labels, start, period), period) for period in range(1, _LONGEST_RUN + 1)]
        count, period = max(runs, key=lambda run: (run[0] > 1) * run[0] * run[1])
        count, period = (count, period) if count > 1 else (1, 1)
        yield labels[start : start + period], count
        start += count * period


def _repeats(labels: Sequence[str], start: int, period: int) -> int:
    count = 1
    while labels[start : start + period] == labels[start + count * period : start + (count + 1) * period]:
        count += 1
    return count


def _describe(piece: PieceSummary) -> list[str]:
    calls = "1 call" if piece.num_calls == 1 else f"{piece.num_calls} calls"
    ops = ", ".join(f"{count} {name}" for name, count in piece.ops.items())
    lines = [f"piece {piece.key[:8]}: {calls}, {piece.num_ops} ops", *textwrap.wrap(ops, _COLUMNS)]
    for build in piece.builds:
        size = "every size" if build["size"] is None else f"size {build['size']}"
        lines.append(f"{build['format']}, {size}: {build['seconds']:.2f} s, {build['num_bytes']} bytes")
    return lines


def _box(y: int, height: int, lines: Sequence[str], colour: str) -> str:
    weights = ["bold", *["normal"] * (len(lines) - 1)]
    texts = [
        f'<text x="{2 * _GAP}" y="{y + _PADDING // 2 + _LINE * index + 13}" font-weight="{weight}">'
        f"{html.escape(line)}</text>"
        for index, (line, weight) in enumerate(zip(lines, weights, strict=True))
    ]
    box = f'<rect x="{_GAP}" y="{y}" width="{_BOX}" height="{height}" rx="5" fill="{colour}" stroke="#777777"/>'
    return "\n".join([box, *texts])


def _arrow(top: int, bottom: int) -> str:
    x = _GAP + _BOX // 2
    return (
        f'<path d="M {x} {top} V {bottom - 5}" stroke="#777777" stroke-width="1.5"/>'
        f'<path d="M {x - 4} {bottom - 6} h 8 l -4 6 z" fill="#777777"/>'
    )


def _bracket(top: int, bottom: int, count: int) -> str:
    x = _GAP + _BOX + 6
    return (
        f'<path d="M {x} {top} h 8 V {bottom} h -8" fill="none" stroke="#777777" stroke-width="1.5"/>\n'
        f'<text x="{x + 16}" y="{(top + bottom) // 2 + 5}" font-weight="bold">× {count}</text>'
    )
