"""``warmgraph verify-graphs``: eager, compiled and replayed forward passes must agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.cli.options import ConfigPath, ModelName, Overrides
from cluster.cli.output import AsJson, PlotPath, parse_sizes, progress, show
from cluster.cli.plot import Chart, Series
from cluster.config import DeploymentConfig
from cluster.environment import apply_process_environment

if TYPE_CHECKING:
    from workers.analysis.verify_report import Check, VerifyReport

#: Smallest error that the chart shows, in place of none at all.
_LEAST = 1e-9


def verify_graphs(
    config: ConfigPath,
    overrides: Overrides = None,
    model: ModelName = None,
    sizes: Annotated[str | None, typer.Option(help="Capture sizes, e.g. 1,2,4; else the config's.")] = None,
    freeze_context: Annotated[
        bool,
        typer.Option("--freeze-context", help="On a CPU: graphs keep the metadata of their capture, as on a GPU."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random batches.")] = 0,
    as_json: AsJson = False,
    plot: PlotPath = None,
) -> None:
    """Run random batches in every form and capture size, with poisoned padding; find what differs. Exit 1 if any."""
    apply_process_environment()
    from workers.analysis.verify import verify_graphs as run
    from workers.graphs.backends.frozen_host import FrozenHostGraphBackend
    from workers.runner.device import resolve_device

    chosen = DeploymentConfig.from_file(config, overrides).model_named(model)
    on_cpu = resolve_device(chosen.engine.device).type == "cpu"
    with progress() as on_progress:
        report = run(
            chosen.engine,
            None if sizes is None else parse_sizes(sizes, "--sizes"),
            graph_backend=FrozenHostGraphBackend() if freeze_context and on_cpu else None,
            seed=seed,
            on_progress=on_progress,
        )
    data = {"config": str(config), "model": chosen.name, **report.to_dict()}
    show(data, _parts(report, chosen.name), _chart(report, chosen.name), as_json=as_json, plot=plot)
    if not report.is_ok:
        raise typer.Exit(1)


def _parts(report: VerifyReport, name: str) -> list[Table | str]:
    head = [
        f"[bold]{name}[/] on {report.device}: {report.backend} graphs, attention backend {report.attention}",
        f"differences are relative to the eager, unpadded run; up to {report.tolerance:g} is rounding",
    ]
    if report.backend == "host":
        head.append("host graphs replay with their own step's metadata, a GPU's keep the capture's: --freeze-context")
    table = Table("form", "sizes", "batches", "largest difference", "", box=None, pad_edge=False)
    for form, checks in _by_form(report).items():
        wrong = [check for check in checks if check.problem is not None]
        state = (
            "[green]ok[/]" if not wrong else f"[red]wrong at {', '.join(str(c.num_tokens) for c in wrong)} tokens[/]"
        )
        sizes = f"{len(checks)}, to {max(check.num_tokens for check in checks)}"
        worst = max(check.error for check in checks)
        table.add_row(form, sizes, str(sum(check.num_cases for check in checks)), f"{worst:.2g}", state)
    for form, reason in report.skipped.items():
        table.add_row(form, "-", "-", "-", f"not here: {reason}")
    return [*head, "", table, "", *_findings(report)]


def _findings(report: VerifyReport) -> list[str]:
    if report.is_ok:
        return [f"everything agrees; cudagraph_mode {report.safe_mode} is safe"]
    problems = {check.form: check for check in reversed(report.checks) if check.problem is not None}
    lines = []
    for finding in report.findings:
        check = problems[finding.form]
        where = finding.piece if finding.op is None else f"{finding.op}, {finding.piece}"
        lines += [
            f"[bold]{finding.form}[/], size {finding.num_tokens}, {check.failed_case} batch: {check.problem}",
            f"  first difference: {where}",
            f"  to blame: {finding.blame}. {finding.explanation}",
        ]
    return [*lines, f"safe meanwhile: [bold]compilation_config.cudagraph_mode: {report.safe_mode}[/]{_hint(report)}"]


def _hint(report: VerifyReport) -> str:
    from workers.analysis.verify_report import FormName

    wrong = {check.form for check in report.checks if check.problem is not None}
    return ", together with compilation_config.mode: NONE" if FormName.COMPILED in wrong else ""


def _by_form(report: VerifyReport) -> dict[str, list[Check]]:
    forms: dict[str, list[Check]] = {}
    for check in report.checks:
        forms.setdefault(check.form.value, []).append(check)
    return forms


def _chart(report: VerifyReport, name: str) -> Chart:
    series = []
    for form, checks in _by_form(report).items():
        ordered = sorted(checks, key=lambda check: check.num_tokens)
        errors = [max(_LEAST, min(check.error, 1e3)) for check in ordered]
        series.append(Series(form, [check.num_tokens for check in ordered], errors))
    sizes = sorted({check.num_tokens for check in report.checks})
    limit = Series("allowed", sizes, [report.tolerance] * len(sizes), dashed=True)
    return Chart(
        title=f"{name}: difference from the eager run",
        x_label="capture size (tokens)",
        y_label="largest relative difference of a row",
        series=[*series, limit],
        log_x=True,
        log_y=True,
        note=f"{report.device}; {report.backend} graphs, attention {report.attention}. "
        f"Exact agreement is drawn at {_LEAST:g}, infinity at 1000.",
    )
