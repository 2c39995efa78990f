"""``warmgraph bench``: measurements that end in one JSON line; one module per sub-command."""

from __future__ import annotations

import typer

from cluster.cli import bench_ablation

app = typer.Typer(name="bench", help="Measure.", no_args_is_help=True)
app.command("ablation")(bench_ablation.ablation)


@app.callback()
def _group() -> None:
    """Measurements that end in one JSON line."""
