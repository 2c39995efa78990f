"""``warmgraph bench ablation``: which layer a speed-up comes from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.cli.options import ConfigPath, ModelName, Overrides
from cluster.cli.output import AsJson, PlotPath, parse_sizes, progress, show
from cluster.cli.plot import Chart, Series, write_chart
from cluster.config import DeploymentConfig
from cluster.environment import apply_process_environment

if TYPE_CHECKING:
    from workers.analysis.ablation import AblationReport

_LAYERS = {
    "compile_alone": "compile (no graphs)",
    "graphs_alone": "FULL graphs (no compile)",
    "pieces_in_graphs": "PIECEWISE graphs on compiled pieces",
    "full_over_pieces": "FULL instead of PIECEWISE",
    "graphs_on_compiled": "FULL graphs on compiled pieces",
    "both": "compile and FULL graphs",
}


def ablation(
    config: ConfigPath,
    overrides: Overrides = None,
    model: ModelName = None,
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,32",
    context: Annotated[int, typer.Option(help="Prompt tokens of each request.")] = 32,
    steps: Annotated[int, typer.Option(help="Decode steps per round.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds in which the variants take turns; the median counts.")] = 5,
    as_json: AsJson = False,
    plot: PlotPath = None,
) -> None:
    """Time decode steps with compile on and off and graphs NONE, PIECEWISE and FULL; the last line is JSON."""
    apply_process_environment()
    from workers.analysis.ablation import run_ablation

    engine = DeploymentConfig.from_file(config, overrides).model_named(model).engine
    batches = parse_sizes(batch, "--batch")
    with progress() as on_progress:
        report = run_ablation(engine, batches, context, steps_per_round=steps, rounds=rounds, on_progress=on_progress)
    result = {"benchmark": "ablation", "config": str(config), **report.to_dict()}
    chart = _chart(report)
    if not as_json:
        show(result, _parts(report), chart, as_json=False, plot=plot)
    elif plot is not None:
        write_chart(chart, plot)
    print(json.dumps(result | {"chart": chart.to_dict()}))


def _parts(report: AblationReport) -> list[Table | str]:
    batches = [row.batch for row in report.attributions]
    times = Table("ms per decode step", *(f"batch {batch}" for batch in batches), box=None)
    for variant in report.variants:
        cells = [report.step_ms(variant.name, batch) for batch in batches]
        times.add_row(variant.name, *("-" if cell is None else f"{cell:.3f}" for cell in cells))
    gains = Table("speed-up by layer", *(f"batch {batch}" for batch in batches), box=None)
    for name, label in _LAYERS.items():
        ratios = [getattr(row, name) for row in report.attributions]
        gains.add_row(label, *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios))
    head = f"{report.device}, {report.context} prompt tokens"
    flags = [f"  {variant.name}: {variant.flags}" for variant in report.variants]
    notes = ["PIECEWISE graphs without compiled pieces do not exist: the pieces are what is captured.", *report.notes]
    return [head, "", times, "", gains, "", "what sets each, below engine: in the config", *flags, "", *notes]


def _chart(report: AblationReport) -> Chart:
    batches = [row.batch for row in report.attributions]
    numbers = list(range(len(batches)))
    return Chart(
        title="Decode step by layer",
        x_label="batch size",
        y_label="ms per step",
        kind="bars",
        categories=[str(batch) for batch in batches],
        series=[
            Series(variant.name, numbers, [report.step_ms(variant.name, batch) for batch in batches])
            for variant in report.variants
        ],
        note=f"{report.device}; {report.context} prompt tokens; variants took turns.",
    )
