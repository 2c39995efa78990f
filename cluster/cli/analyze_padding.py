"""``warmgraph analyze padding``: captures with and without padding, and the share of padded rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.cli.output import AsJson, PlotPath, parse_sizes, show
from cluster.cli.plot import Chart, Series
from workers.analysis.load import read_load, uniform_load
from workers.analysis.padding import PaddingReport, analyze_padding
from workers.graphs.sizes import default_capture_sizes

_MAX_TABLE_ROWS = 64


def padding(
    sizes: Annotated[str | None, typer.Option(help="Capture sizes, e.g. 1,2,4,8; else the default grid.")] = None,
    max_size: Annotated[int, typer.Option(help="Uniform load: batch sizes 1 to this, once each.")] = 8,
    load: Annotated[
        Path | None,
        typer.Option(help='A recorded batch histogram, or a trace: one {"num_tokens": 5, "count": 2} per line.'),
    ] = None,
    as_json: AsJson = False,
    plot: PlotPath = None,
) -> None:
    """Count the graphs that a load needs with and without padding, and the rows that padding wastes."""
    batches = uniform_load(max_size) if load is None else read_load(load)
    largest = max(batches)
    grid = parse_sizes(sizes, "--sizes") if sizes is not None else default_capture_sizes(largest, 2 * largest)
    report = analyze_padding(batches, grid)
    source = f"batch sizes 1 to {largest}, once each" if load is None else str(load)
    parts: list[Table | str] = [_table(report), *_summary(report, source)]
    show(report.to_dict(), parts, _chart(report, source), as_json=as_json, plot=plot)


def _table(report: PaddingReport) -> Table:
    table = Table("batch", "batches", "runs in graph", "padded rows", box=None)
    for row in report.rows[:_MAX_TABLE_ROWS]:
        graph = "none (above the largest)" if row.graph_size is None else str(row.graph_size)
        table.add_row(str(row.size), str(row.count), graph, str(row.num_padded))
    if len(report.rows) > _MAX_TABLE_ROWS:
        table.add_row(f"… {len(report.rows) - _MAX_TABLE_ROWS} more sizes; --json has all", "", "", "")
    return table


def _summary(report: PaddingReport, source: str) -> list[str]:
    lines = [
        f"\nload: {source}; capture sizes {', '.join(map(str, report.sizes))}",
        f"captures: {report.captures_with_padding} with padding, {report.captures_without_padding} without",
        f"padded rows: {report.padded_share:.1%} of all rows",
    ]
    if report.graphless_share:
        lines.append(f"above the largest size, without a graph: {report.graphless_share:.1%} of the batches")
    return lines


def _chart(report: PaddingReport, source: str) -> Chart:
    numbers = list(range(len(report.rows)))
    return Chart(
        title=f"{report.captures_with_padding} captures instead of {report.captures_without_padding}, "
        f"{report.padded_share:.0%} of the rows padding",
        x_label="batch size (tokens)",
        y_label="rows that run",
        kind="stacked",
        categories=_thinned([str(row.size) for row in report.rows]),
        series=[
            Series("real", numbers, [row.size for row in report.rows]),
            Series("padding", numbers, [row.num_padded for row in report.rows]),
        ],
        note=f"Load: {source}. Capture sizes: {', '.join(map(str, report.sizes))}.",
    )


def _thinned(labels: list[str]) -> list[str]:
    """Every n-th label, so that they do not run into each other."""
    step = -(-len(labels) // 32)
    return [label if index % step == 0 else "" for index, label in enumerate(labels)]
