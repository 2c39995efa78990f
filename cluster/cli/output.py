"""What the analysing commands share: a table for people, JSON for programs, a chart for documents."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

from cluster.cli.plot import Chart, write_chart

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
#: Columns of the widest table.
_WIDEST = 1000

PlotPath = Annotated[Path | None, typer.Option("--plot", help="Also draw a chart to this .png or .svg file.")]


def show(
    data: dict[str, Any], parts: Sequence[RenderableType], chart: Chart, *, as_json: bool, plot: Path | None
) -> None:
    """Print ``data`` and the chart as JSON, or ``parts`` one below the other; draw the chart if asked to."""
    if as_json:
        print(json.dumps(data | {"chart": chart.to_dict()}, indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False)
        for part in parts:
            console.print(part)
    if plot is not None:
        write_chart(chart, plot)
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"chart: {plot}")


def print_table(table: Table) -> None:
    """Print a table as wide as it is, whatever the terminal: a name that is cut or folded cannot be copied."""
    console = Console(highlight=False)
    needed = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    Console(highlight=False, width=max(needed, console.width)).print(table)


def count_of(number: int, noun: str) -> str:
    """``1 bundle``, ``2 bundles``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def parse_sizes(text: str, name: str) -> list[int]:
    """``1,2,4`` as numbers, ascending and each once.

    Raises:
        typer.BadParameter: Something else.
    """
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list such as 1,2,4,8.", param_hint=name) from None
    if sizes[0] < 1:
        raise typer.BadParameter(f"{sizes[0]} is below 1.", param_hint=name)
    return sizes


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A callback that shows on standard error, where that is a terminal, what is happening now."""
    with Console(stderr=True, highlight=False).status("starting") as status:
        yield status.update
