"""``warmgraph startup``: how an engine started, as a waterfall."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from cluster.cli.output import print_table
from cluster.cli.server import replica_reports
from workers.checkpoint.cache import artifacts_root
from workers.errors import UserError
from workers.startup.files import read_report
from workers.startup.report import PhaseRow, StartupReport

app = typer.Typer(name="startup", help="Look at how engines started.", no_args_is_help=True)

#: Columns of the bars, and of numbers, bytes and spaces beside them; a note may go beyond the terminal's edge.
_BAR_WIDTHS = (16, 48)
_BESIDE_BARS = 34


@app.callback()
def _group() -> None:
    """Keeps ``show`` a sub-command while it is the only one."""


@app.command()
def show(
    url: Annotated[
        str | None, typer.Option(help="The replicas of a running server, e.g. http://127.0.0.1:8000.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A kept account, or a folder of them, whose newest is taken.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a waterfall.")] = False,
) -> None:
    """Draw the phases of a start; by default of the last engine that was started on this machine."""
    if url is not None and file is not None:
        raise UserError("Give --url or --file, not both.")
    if url is not None:
        asked = replica_reports(url, "startup")
        reports = {
            f"{model}, {replica}": StartupReport.from_dict(data)
            for model, replicas in asked.items()
            for replica, data in replicas.items()
        }
    else:
        report = read_report(file or artifacts_root() / "startup")
        reports = {f"{report.title}, process {report.pid} on {report.host}": report}
    if as_json:
        print(json.dumps({name: report.to_dict() for name, report in reports.items()}, indent=2))
        return
    console = Console(highlight=False)
    for name, report in reports.items():
        console.print(f"[bold]{name}[/], {report.started_at}", soft_wrap=True)
        print_table(waterfall(report, console.width))
        for line in summary(report):
            console.print(line, soft_wrap=True)


def waterfall(report: StartupReport, width: int) -> Table:
    """One row per phase: its name below its parent's, its place in time, its length.

    Args:
        width: Columns of the terminal; bars take what is left of them.
    """
    names = ["  " * _depth(report.phases, phase) + phase.name for phase in report.phases]
    longest = max(map(len, names), default=0)
    bar_width = min(max(width - longest - _BESIDE_BARS, _BAR_WIDTHS[0]), _BAR_WIDTHS[1])
    table = Table("phase", "", "from", "seconds", "bytes", "", box=None, pad_edge=False)
    ends = [phase.end_s for phase in report.phases if phase.end_s is not None]
    total_s = max([*ends, report.ready_s or 0.0, report.first_token_s or 0.0, 1e-9])
    for phase in _in_tree_order(report.phases):
        end_s = total_s if phase.end_s is None else phase.end_s
        table.add_row(
            "  " * _depth(report.phases, phase) + phase.name,
            _bar(phase.start_s / total_s, end_s / total_s, bar_width),
            f"{phase.start_s:.2f}",
            "running" if phase.end_s is None else f"{end_s - phase.start_s:.2f}",
            decimal(phase.num_bytes) if phase.num_bytes else "",
            phase.note,
        )
    return table


def summary(report: StartupReport) -> list[str]:
    """What the waterfall does not show: moments, lookups, savings."""
    moments = {"ready": report.ready_s, "first token": report.first_token_s, "compiled pieces in": report.swapped_s}
    lines = [", ".join(f"{name} after {at_s:.2f} s" for name, at_s in moments.items() if at_s is not None)]
    if report.process_age_s > 0.05:
        lines.append(f"the process had been there for {report.process_age_s:.1f} s")
    for lookup in report.lookups:
        kind = "hit" if lookup.is_hit else "miss"
        size = f", {decimal(lookup.num_bytes)}" if lookup.num_bytes else ""
        reason = f": {lookup.reason}" if lookup.reason else ""
        saved = f", saved {lookup.saved_s:.1f} s" if lookup.saved_s else ""
        lines.append(f"{lookup.what}: {kind}{reason}{size}{saved}")
    return [line for line in lines if line]


def _bar(start: float, end: float, width: int) -> Text:
    first = min(round(start * width), width - 1)
    length = max(round(end * width) - first, 1)
    return Text(" " * first + "█" * length, style="cyan")


def _in_tree_order(phases: list[PhaseRow]) -> list[PhaseRow]:
    """Parents before their children, everything else by its beginning."""
    ordered: list[PhaseRow] = []

    def add(parent: int | None) -> None:
        for index, phase in enumerate(phases):
            if phase.parent == parent:
                ordered.append(phase)
                add(index)

    add(None)
    return ordered


def _depth(phases: list[PhaseRow], phase: PhaseRow) -> int:
    return 0 if phase.parent is None else 1 + _depth(phases, phases[phase.parent])
