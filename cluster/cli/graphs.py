"""``warmgraph graphs``: what the graph layer captured, held, replayed and padded.

Asks a running server, or captures every graph of a config here, with made-up weights, and prints the account.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from cluster.cli.options import Overrides
from cluster.cli.server import replica_reports
from cluster.config import DeploymentConfig
from workers.config import EngineConfig
from workers.errors import UserError

app = typer.Typer(name="graphs", help="Look at captured graphs.", no_args_is_help=True)

#: Name of the one replica that is captured here, without a server.
_HERE = "captured here"


@app.callback()
def _group() -> None:
    """Keeps ``show`` a sub-command while it is the only one."""


@app.command()
def show(
    config: Annotated[Path | None, typer.Argument(help="The deployment's YAML file; not needed with --url.")] = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Which of the models, if there are several.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Ask the replicas of a running server, e.g. http://127.0.0.1:8000.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print graphs by mode and size, with capture seconds, memory, replays, padding and eager fallbacks."""
    if (config is None) == (url is None):
        raise UserError("Give a config, whose graphs are captured here, or --url to ask a running server.")
    reports = replica_reports(url, "graphs") if url is not None else {}
    if config is not None:
        deployment = DeploymentConfig.from_file(config, overrides).model_named(model)
        reports = {deployment.name: {_HERE: _capture(deployment.engine)}}
    elif model is not None:
        if model not in reports:
            raise UserError(f"{url} serves no model {model!r}; it serves {', '.join(map(repr, reports))}.")
        reports = {model: reports[model]}
    if as_json:
        print(json.dumps(reports, indent=2))
    else:
        _print(reports)


def _capture(engine_config: EngineConfig) -> dict[str, Any]:
    """Capture every graph of an engine with made-up weights."""
    from workers.engine.engine import Engine

    engine = Engine(engine_config.model_copy(update={"load_format": "dummy", "skip_tokenizer_init": True}))
    while engine.use_idle_time():
        pass
    return engine.graph_report().to_dict()


def _print(reports: dict[str, dict[str, dict[str, Any]]]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for model, replicas in reports.items():
        if not replicas:
            console.print(f"{model}: no replica answers")
        for replica, report in replicas.items():
            console.print(f"[bold]{model}[/], {replica}: mode {report['mode']}, {report['backend']} backend")
            _print_report(console, report)


def _print_report(console: Console, report: dict[str, Any]) -> None:
    if report["mode_reason"] is not None:
        console.print(report["mode_reason"])
    elif report["mode"] == "NONE":
        console.print("graphs are off, as they are by default on a CPU; set compilation_config.cudagraph_mode")
    if report["graphs"]:
        console.print(f"sizes: {report['sizes_from']}: {', '.join(map(str, report['capture_sizes']))}")
        console.print(_graph_table(report["graphs"]))
    held = ", ".join(f"{count} {mode}" for mode, count in report["captured"].items()) or "none"
    limit = report["memory_limit_bytes"]
    console.print(
        f"captured: {held} in {report['capture_seconds']:.2f} s, {report['pending']} sizes pending, "
        f"{decimal(report['memory_bytes'])}{'' if limit is None else f' of {decimal(limit)}'}"
    )
    if report["busy_captures"]:
        console.print(
            f"running batches waited for {report['busy_captures']} captures, {report['busy_capture_seconds']:.3f} s in "
            f"all and {report['longest_busy_capture_s']:.3f} s at most"
        )
    batches = ", ".join(f"{count} {mode}" for mode, count in report["batches"].items()) or "none"
    console.print(f"batches: {batches}; {report['tokens']} tokens and {report['padded_tokens']} of padding")
    for reason, count in report["eager_fallbacks"].items():
        console.print(f"without a graph: {count}, {reason}")
    for reason in report["skipped"]:
        console.print(f"left out: {reason}")


def _graph_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("mode", "tokens", "requests", "state", "graphs", "seconds", "memory", "replays", box=None)
    for row in rows:
        table.add_row(
            f"{row['mode']}{' (decode)' if row['uniform'] else ''}",
            str(row["num_tokens"]),
            "any" if row["num_reqs"] is None else str(row["num_reqs"]),
            row["state"] if row["dropped_because"] is None else f"dropped: {row['dropped_because']}",
            str(row["num_graphs"]),
            f"{row['capture_seconds']:.3f}",
            decimal(row["num_bytes"]),
            str(row["num_replays"]),
        )
    return table
