"""``warmgraph bench``: measurements that end in one JSON line; one module per sub-command."""

from __future__ import annotations

import typer

from cluster.cli import bench_ablation, bench_serving

app = typer.Typer(name="bench", help="Measure, and end in one JSON line.", no_args_is_help=True)
app.command("ablation")(bench_ablation.ablation)
app.command("serving")(bench_serving.serving)
