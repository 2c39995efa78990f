"""``warmgraph analyze``: what graphs, padding and splitting cost and gain, as numbers."""

from __future__ import annotations

import typer

from cluster.cli import analyze_crossover, analyze_launches, analyze_padding, analyze_plot

app = typer.Typer(name="analyze", help="Models of launch overhead, beside measurements.", no_args_is_help=True)
app.command("padding")(analyze_padding.padding)
app.command("launches")(analyze_launches.launches)
app.command("crossover")(analyze_crossover.crossover)
app.command("plot")(analyze_plot.plot)
