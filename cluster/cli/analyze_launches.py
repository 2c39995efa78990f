"""``warmgraph analyze launches``: launches per step of FULL, PIECEWISE and eager, modelled and counted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.cli.options import ModelName, Overrides
from cluster.cli.output import AsJson, PlotPath, show
from cluster.cli.plot import Chart, Series
from cluster.config import DeploymentConfig
from cluster.environment import apply_process_environment
from workers.analysis.launches import LaunchCounts, Segment, count_launches, synthetic_segments

if TYPE_CHECKING:
    from workers.analysis.model_launches import ModelLaunches


def launches(
    config: Annotated[
        Path | None, typer.Argument(help="A deployment's YAML file: count the launches of its model.")
    ] = None,
    overrides: Overrides = None,
    model: ModelName = None,
    ops: Annotated[int, typer.Option(help="Without a config: ops of a synthetic model.")] = 10,
    split: Annotated[list[int] | None, typer.Option(help="Its split points, numbered from 0. Repeatable.")] = None,
    batch: Annotated[int, typer.Option(help="With a config: requests of the decode batch.", min=1)] = 1,
    as_json: AsJson = False,
    plot: PlotPath = None,
) -> None:
    """Count the launches of a decode step op by op, as piecewise graphs, and as one full graph."""
    if config is None:
        segments = synthetic_segments(ops, [5] if split is None else split)
        counts = count_launches(segments)
        data = {"segments": [_segment(segment) for segment in segments], "predicted": counts.to_dict()}
        show(data, _synthetic_parts(segments, counts), _synthetic_chart(counts), as_json=as_json, plot=plot)
        return
    apply_process_environment()
    from workers.analysis.model_launches import count_model_launches

    chosen = DeploymentConfig.from_file(config, overrides).model_named(model)
    counted = count_model_launches(chosen.engine, batch)
    data = {"config": str(config), "model": chosen.name, **counted.to_dict()}
    show(data, _model_parts(counted, chosen.name), _model_chart(counted, chosen.name), as_json=as_json, plot=plot)


def _segment(segment: Segment) -> dict[str, object]:
    return {"name": segment.name, "num_ops": segment.num_ops, "is_captured": segment.is_captured}


def _synthetic_parts(segments: list[Segment], counts: LaunchCounts) -> list[Table | str]:
    table = Table("segment", "ops", "in PIECEWISE", "launches", box=None)
    for segment in segments:
        how = "one graph" if segment.is_captured else "eager, op by op"
        table.add_row(segment.name, str(segment.num_ops), how, "1" if segment.is_captured else str(segment.num_ops))
    return [table, "", f"launches per step: eager {counts.eager}, PIECEWISE {counts.piecewise}, FULL {counts.full}"]


def _synthetic_chart(counts: LaunchCounts) -> Chart:
    return Chart(
        title="Launches per step",
        x_label="how the step runs",
        y_label="launches",
        kind="bars",
        categories=["eager", "PIECEWISE", "FULL"],
        series=[Series("launches", [0, 1, 2], [counts.eager, counts.piecewise, counts.full])],
        note="A synthetic model: every op is one launch, every captured segment one replay.",
    )


def _model_parts(counted: ModelLaunches, name: str) -> list[Table | str]:
    pieces = [segment for segment in counted.segments if segment.is_captured]
    between = len(counted.segments) - len(pieces)
    table = Table("form", "predicted", "counted", "singly", "as graphs", "", box=None)
    for row in counted.rows:
        predicted = "-" if row.predicted is None else str(row.predicted)
        table.add_row(row.form, predicted, f"{row.measured:g}", f"{row.kernels:g}", f"{row.graphs:g}", row.note)
    return [
        f"{name} on {counted.device}: the forward pass of a decode batch of {counted.batch}",
        f"cut at attention into {len(pieces)} pieces with {between} attention ops between them",
        f"a launch here: {counted.unit}",
        "",
        table,
    ]


def _model_chart(counted: ModelLaunches, name: str) -> Chart:
    numbers = list(range(len(counted.rows)))
    return Chart(
        title=f"{name}: launches per decode step",
        x_label="how the forward pass runs",
        y_label=f"launches ({counted.unit})",
        kind="bars",
        categories=[row.form for row in counted.rows],
        series=[
            Series("predicted", numbers, [row.predicted for row in counted.rows]),
            Series("counted by the profiler", numbers, [row.measured for row in counted.rows]),
        ],
        note=f"{counted.device}; decode batch of {counted.batch}.",
    )
