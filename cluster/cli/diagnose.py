"""``warmgraph diagnose``: what limits a decode step of a config, and what to change first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from cluster.cli.options import ConfigPath, ModelName, Overrides
from cluster.cli.output import AsJson, PlotPath, parse_sizes, progress, show
from cluster.cli.plot import Chart, Mark, Series
from cluster.config import DeploymentConfig
from cluster.environment import apply_process_environment

if TYPE_CHECKING:
    from workers.analysis.diagnose import Diagnosis
    from workers.analysis.diagnosis import Fix

#: What each verdict means, for whoever reads it for the first time.
_MEANING = {
    "launch-bound": "the device waits for the CPU to launch ops one by one",
    "host-bound": "the device waits for scheduling and sampling on the CPU between steps",
    "memory-bound": "reading weights and cached keys and values takes the time; larger batches share the weights",
    "compute-bound": "arithmetic takes the time; larger batches no longer help",
}


def diagnose(
    config: ConfigPath,
    overrides: Overrides = None,
    model: ModelName = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, e.g. 1,8,64; else powers of two.")] = None,
    context: Annotated[int | None, typer.Option(help="Prompt tokens of each request.")] = None,
    as_json: AsJson = False,
    plot: PlotPath = None,
) -> None:
    """Run decode steps under the profiler; say what limits them, what to change, and where graphs stop mattering."""
    apply_process_environment()
    from workers.analysis.diagnose import default_batches
    from workers.analysis.diagnose import diagnose as run

    deployment = DeploymentConfig.from_file(config, overrides)
    chosen = deployment.model_named(model)
    batches = default_batches(chosen.engine) if batch is None else parse_sizes(batch, "--batch")
    if len(batches) < 2:
        raise typer.BadParameter("give at least two batch sizes.", param_hint="--batch")
    with progress() as on_progress:
        found = run(chosen.engine, batches, context, on_progress=on_progress)
    data = {"config": str(config), "model": chosen.name, **found.to_dict()}
    show(
        data,
        _parts(found, chosen.name, config, deployment.models.index(chosen)),
        _chart(found, chosen.name),
        as_json=as_json,
        plot=plot,
    )


def _parts(found: Diagnosis, name: str, config: Path, index: int) -> list[Table | str]:
    rates = found.rates
    head = [
        f"[bold]{name}[/] on {found.device}, decode with {found.context} prompt tokens per request",
        f"this device reaches {rates.bandwidth / 1e9:.0f} GB/s of memory traffic and "
        f"{rates.matmul_flops / 1e12:.3g} TFLOP/s",
    ]
    if found.device_type == "cpu":
        head += [
            "no GPU: a launch is an op that Python dispatches, and the work waits for it instead of overlapping;",
            "a recorded native program, which runs the model in one call, does here what captured graphs do on a GPU",
        ]
    verdict = [*_verdicts(found), "", *_crossover(found), "", *_fix(found.fix, config, index)]
    return [*head, *_busy_host(), "", _table(found), "", *verdict]


def _busy_host() -> list[str]:
    """A warning where other work on this machine is likely to have moved the figures."""
    load, num_cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load <= 1.5 * num_cpus:
        return []
    return [f"[yellow]this machine is busy (load {load:.1f} on {num_cpus} CPUs): the figures below may be off[/]"]


def _table(found: Diagnosis) -> Table:
    op = "kernel" if found.device_type == "cuda" else "op"
    table = Table(box=None, pad_edge=False)
    for name in ("batch", "ms per\nstep", "at\nbest", f"{op}s", "launches", f"us per\n{op}", "us per\nlaunch", "busy"):
        table.add_column(name, justify="right", vertical="bottom")
    table.add_column("gaps\nms", justify="right")
    table.add_column("limited by")
    for step, limit in zip(found.steps, found.limits, strict=True):
        table.add_row(
            str(step.batch),
            f"{step.step_us / 1e3:.2f}",
            f"{step.work.floor_us / 1e3:.2f}",
            f"{step.kernels:.0f}",
            f"{step.launches:.0f}",
            f"{step.kernel_us:.1f}",
            f"{step.launch_us:.1f}",
            f"{step.busy_share:.0%}",
            f"{max(0.0, step.step_us - step.busy_us) / 1e3:.2f}",
            limit.value.removesuffix("-bound"),
        )
    return table


def _verdicts(found: Diagnosis) -> list[str]:
    lines = []
    for limit in dict.fromkeys(found.limits):
        batches = [str(step.batch) for step, other in zip(found.steps, found.limits, strict=True) if other is limit]
        lines.append(f"[bold]{limit.value}[/] at batch {', '.join(batches)}: {_MEANING[limit.value]}")
    return lines


def _crossover(found: Diagnosis) -> list[str]:
    table = ", ".join(f"{row.speedup:.2f}x at {row.batch}" for row in found.comparisons)
    crossover = found.crossover
    predicted = "no batch size" if crossover.predicted is None else f"batch {crossover.predicted}"
    measured = f"beyond batch {crossover.largest}" if crossover.measured is None else f"batch {crossover.measured}"
    what = "graphs" if found.device_type == "cuda" else "launching the step in one call"
    return [
        f"{found.replayed} against {found.single}: {table}",
        f"{what} gains less than 10 % from: predicted {predicted} (from batches "
        f"{', '.join(map(str, crossover.fitted))}), measured {measured}",
    ]


def _fix(fix: Fix, config: Path, index: int) -> list[str]:
    if fix.key is None:
        return [f"first fix: {fix.why}"]
    path = f"models.{index}.engine.{fix.key}"
    line = _line_of(config, path.split("."))
    value = str(fix.value).lower() if isinstance(fix.value, bool) else str(fix.value)
    where = f"{config}, line {line}" if line is not None else f"{config}, a new line below models[{index}].engine"
    return [
        f"first fix: [bold]{fix.key}: {value}[/] ({where})",
        f"  {fix.why}",
        f"  try it first: --set {path}={value}",
    ]


def _line_of(config: Path, path: list[str]) -> int | None:
    """The line of a key in a YAML file, or None if it is not there."""
    node: Any = yaml.compose(config.read_text(encoding="utf-8"))
    line = None
    for part in path:
        if isinstance(node, yaml.SequenceNode):
            node = node.value[int(part)]
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in pairs if key.value == part), None)
        if found is None:
            return None
        key, node = found
        line = key.start_mark.line + 1
    return line


def _chart(found: Diagnosis, name: str) -> Chart:
    batches = [row.batch for row in found.comparisons]
    crossover = found.crossover
    marks = [] if crossover.measured is None else [Mark(crossover.measured, "measured: gain below 10 %")]
    if crossover.predicted is not None and crossover.predicted <= 4 * crossover.largest:
        marks.append(Mark(crossover.predicted, "predicted", dashed=True))
    return Chart(
        title=f"{name}: where launching all at once stops mattering",
        x_label="batch size",
        y_label="ms per decode step",
        series=[
            Series(found.single, batches, [row.single_us / 1e3 for row in found.comparisons]),
            Series(found.replayed, batches, [row.replayed_us / 1e3 for row in found.comparisons]),
            Series("at best", batches, [step.work.floor_us / 1e3 for step in found.steps], dashed=True),
        ],
        log_x=True,
        log_y=True,
        marks=marks,
        note=f"{found.device}; {found.context} prompt tokens per request.",
    )
