"""``warmgraph warm``: build and publish everything for a deployment before its replicas start."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from cluster.cli.options import ConfigPath, ModelName, Overrides
from cluster.config import DeploymentConfig


def warm(
    config: ConfigPath,
    overrides: Overrides = None,
    model: ModelName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compile a deployment's models in every format and publish them; run it on a machine like the replicas'."""
    from workers.engine.warm import warm as warm_engine

    deployment = DeploymentConfig.from_file(config, overrides)
    models = deployment.models if model is None else [deployment.model_named(model)]
    progress = Console(stderr=True, highlight=False)
    reports = {}
    for item in models:
        progress.print(f"[bold]{item.name}[/]")
        reports[item.name] = warm_engine(item.engine, on_progress=progress.print)
    if as_json:
        print(json.dumps({name: dataclasses.asdict(report) for name, report in reports.items()}, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, report in reports.items():
        console.print(f"[bold]{name}[/], bundle {report.key[:12]}: {report.seconds:.1f} s, {report.num_graphs} graphs")
        table = Table("format", "builds", "size", "seconds", "", box=None)
        for row in report.formats:
            state = "was there" if row.was_there else "built"
            table.add_row(row.name, str(row.num_pieces), decimal(row.num_bytes), f"{row.seconds:.1f}", state)
        console.print(table)
