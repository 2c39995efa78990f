"""``warmgraph model``: import models into the cache, list them, verify them.

Draws and prints; what is drawn happens in cluster.models. A UserError is left to the entry point to print.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.models.importer import import_model, verify_model
from cluster.models.manifest import read_manifest
from cluster.models.progress import Progress as ImportProgress
from cluster.models.progress import Stage
from cluster.models.registry import KNOWN_MODELS
from workers.checkpoint.cache import imported_models, model_folder, models_root

app = typer.Typer(name="model", help="Import models into the cache, list and verify them.", no_args_is_help=True)


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """One imported model, as listed; the source is None for a folder that no import made."""

    name: str
    num_bytes: int
    source: str | None
    folder: str


_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@contextlib.contextmanager
def import_progress() -> Iterator[ImportProgress]:
    """A progress callback that draws one Rich bar per stage on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    tasks: dict[Stage, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def show(stage: Stage, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage.value, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


@app.command("import")
def import_command(
    source: Annotated[str, typer.Argument(help="A .gguf file, a wheel that holds one, or a known model's name.")],
    name: Annotated[str | None, typer.Option(help="Name in the cache.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Import again, replacing what has this name.")] = False,
    as_json: _Json = False,
) -> None:
    """Turn a GGUF file into a Hugging Face checkpoint folder in the cache."""
    with import_progress() as progress:
        result = import_model(source, name=name, force=force, progress=progress)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), default=str))
    else:
        typer.echo(f"{result.name} is {'already ' if result.was_there else ''}imported: {result.folder}")


@app.command("ls")
def ls_command(as_json: _Json = False) -> None:
    """List imported models, and known ones that can be imported by name."""
    rows = [_row(name) for name in imported_models()]
    known = sorted(KNOWN_MODELS.keys() - {row.name for row in rows})
    if as_json:
        typer.echo(json.dumps({"imported": [dataclasses.asdict(row) for row in rows], "known": known}))
        return
    lines = [(row.name, decimal(row.num_bytes), row.source or "unknown source") for row in rows]
    lines += [(name, "", f"not yet: warmgraph model import {name}") for name in known]
    width = max(len(name) for name, _, _ in lines)
    typer.echo(f"in {models_root()}:")
    for name, size, source in lines:
        typer.echo(f"{name:<{width}}  {size:>9}  {source}")


@app.command("verify")
def verify_command(
    names: Annotated[list[str] | None, typer.Argument(help="Imported models; all of them if none is named.")] = None,
    as_json: _Json = False,
) -> None:
    """Read imported models and compare every file with its digest; exit with 1 if something is wrong."""
    damage: dict[str, list[str]] = {}
    for name in names or imported_models():
        with import_progress() as progress:
            damage[name] = verify_model(name, progress)
    if as_json:
        typer.echo(json.dumps({name: {"ok": not found, "damage": found} for name, found in damage.items()}))
    else:
        for name, found in damage.items():
            typer.echo(f"{name}: {' '.join(found) or 'ok'}")
        if not damage:
            typer.echo("No model has been imported.")
    if any(damage.values()):
        raise typer.Exit(1)


def _row(name: str) -> _Row:
    folder = model_folder(name)
    manifest = read_manifest(folder)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return _Row(name, num_bytes, manifest.source if manifest else None, str(folder))
