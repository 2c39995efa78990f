"""``warmgraph analyze crossover``: after how many steps a capture has paid for itself."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from cluster.cli.output import AsJson, PlotPath, parse_sizes, show
from cluster.cli.plot import Chart, Series
from workers.analysis.crossover import DEFAULT_NUM_OPS, CrossoverRow, StepCosts, analyze_crossover, unit_costs

_UNITS = "costs in launches; a replay is one launch"

#: Steps that the chart shows.
_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)


def crossover(
    num_ops: Annotated[str, typer.Option(help="Ops per step.")] = ",".join(map(str, DEFAULT_NUM_OPS)),
    measured: Annotated[
        bool, typer.Option("--measured", help="Time launches, replays and captures on this device.")
    ] = False,
    device: Annotated[str, typer.Option(help="For --measured: auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
    plot: PlotPath = None,
) -> None:
    """Say when a captured graph has earned its capture, and when it never will."""
    ops = parse_sizes(num_ops, "--num-ops")
    costs, source = _measured(ops, device) if measured else (unit_costs(ops), _UNITS)
    rows = [analyze_crossover(cost) for cost in costs]
    data = {"source": source, "rows": [row.to_dict() for row in rows]}
    parts: list[Table | str] = [
        f"{source}\n",
        _table(rows),
        "",
        *(f"{_ops(row)}: {row.explanation}" for row in rows),
    ]
    show(data, parts, _chart(rows, source), as_json=as_json, plot=plot)


def _measured(ops: list[int], device_name: str) -> tuple[list[StepCosts], str]:
    from workers.analysis.costs import measure_step_costs
    from workers.runner.device import resolve_device

    measured = measure_step_costs(ops, resolve_device(device_name))
    return measured.costs, measured.source


def _table(rows: list[CrossoverRow]) -> Table:
    unit = rows[0].costs.unit
    columns = ["ops", f"step ({unit})", f"replay ({unit})", f"capture ({unit})", "pays off after", "speed-up"]
    table = Table(*columns, box=None)
    for row in rows:
        costs = row.costs
        after = "never" if row.steps_to_pay_off is None else f"{row.steps_to_pay_off} steps"
        table.add_row(
            str(costs.num_ops),
            f"{costs.eager:.4g}",
            f"{costs.replay:.4g}",
            f"{costs.capture:.4g}",
            after,
            f"{row.asymptotic_speedup:.3g}x",
        )
    return table


def _chart(rows: list[CrossoverRow], source: str) -> Chart:
    """Cost without a graph over cost with it, capture included, against the number of steps."""
    labels = [f"{_ops(row)}, capture {row.costs.capture:.4g} {row.costs.unit}" for row in rows]
    seen = list(dict.fromkeys(row.costs.num_ops for row in rows))
    return Chart(
        title="When a capture has paid for itself",
        x_label="steps since the capture",
        y_label="speed-up so far, capture included",
        series=[
            Series(
                label,
                _STEPS,
                [n * row.costs.eager / (row.costs.capture + n * row.costs.replay) for n in _STEPS],
                dashed=row.costs.capture > row.costs.eager,
                colour=seen.index(row.costs.num_ops),
            )
            for label, row in zip(labels, rows, strict=True)
        ],
        log_x=True,
        log_y=True,
        note=f"Above 1 the capture has paid for itself; {source}.",
    )


def _ops(row: CrossoverRow) -> str:
    return f"{row.costs.num_ops} {'op' if row.costs.num_ops == 1 else 'ops'}"
