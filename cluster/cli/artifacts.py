"""``warmgraph artifacts``: what the store of compiled artifacts holds, whether it is sound, and why a start missed.

Draws and prints; what is drawn comes from workers.artifacts. Commands that change a store are in artifacts_manage.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from cluster.cli import artifacts_manage
from cluster.cli.artifact_options import ConfigFile, Json, Key, Store, StoreOption, Trusted, open_library, store_errors
from cluster.cli.options import ConfigPath, ModelName, Overrides
from cluster.cli.output import count_of, print_table
from cluster.config import DeploymentConfig
from workers.artifacts.catalog import Row, describe, find_key, list_bundles
from workers.artifacts.catalog import verify as verify_bundle
from workers.artifacts.errors import Refusal
from workers.artifacts.explain import Difference, Explanation
from workers.errors import ConfigError

app = typer.Typer(name="artifacts", help="Look at and manage compiled artifacts.", no_args_is_help=True)
artifacts_manage.add_commands(app)

_KEY_LENGTH = 12


@app.command("ls")
def ls_command(
    store: Store = None,
    store_option: StoreOption = None,
    config: ConfigFile = None,
    trust: Trusted = None,
    as_json: Json = False,
) -> None:
    """List bundles, and what keeps them from being used."""
    library = open_library(store, store_option, config, trust)
    with store_errors():
        rows = list_bundles(library)
    if as_json:
        print(json.dumps({"store": library.store.url, "bundles": [dataclasses.asdict(row) for row in rows]}, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{library.store.url}: {count_of(len(rows), 'bundle')}", markup=False)
    table = Table("key", "status", "model", "device", "formats", "size", "built in", "last use", "", box=None)
    for row in rows:
        table.add_row(*map(escape, _cells(row)))
    if rows:
        print_table(table)


@app.command("show")
def show_command(
    key: Key,
    store: Store = None,
    store_option: StoreOption = None,
    config: ConfigFile = None,
    trust: Trusted = None,
    as_json: Json = False,
) -> None:
    """Show one bundle: factors of its key, entries, manifests, marks."""
    library = open_library(store, store_option, config, trust)
    with store_errors():
        data = describe(library, find_key(library, key))
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        _print_bundle(data)


@app.command("explain")
def explain_command(
    config: ConfigPath,
    overrides: Overrides = None,
    model: ModelName = None,
    as_json: Json = False,
) -> None:
    """Say whether an engine of this config would find its bundle, and if not, which factors differ; exit 1 if not."""
    from workers.artifacts.library import ArtifactLibrary
    from workers.runner.artifacts import compiles_pieces, key_of_config

    engine = DeploymentConfig.from_file(config, overrides).model_named(model).engine
    if not compiles_pieces(engine):
        raise ConfigError(
            "An engine of this config compiles nothing, so it looks for no bundle: set compilation_config.mode to"
            " VLLM_COMPILE.",
            param="mode",
        )
    library = ArtifactLibrary.from_config(engine.artifacts)
    key = key_of_config(engine)
    lookup = library.open(key)
    explanation = lookup.explanation
    if as_json:
        data = {"key": key.digest, "outcome": lookup.outcome.value}
        print(json.dumps(data | ({"explanation": dataclasses.asdict(explanation)} if explanation else {}), indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False)
        console.print(f"key {key.digest[:_KEY_LENGTH]} in {library.store.url}: {lookup.outcome}", markup=False)
        if explanation is not None:
            _print_explanation(console, explanation)
    if lookup.bundle is None:
        raise typer.Exit(1)


@app.command("verify")
def verify_command(
    keys: Annotated[list[str] | None, typer.Argument(help="Beginnings of keys; every bundle if none is given.")] = None,
    store: Store = None,
    store_option: StoreOption = None,
    config: ConfigFile = None,
    trust: Trusted = None,
    as_json: Json = False,
) -> None:
    """Check signatures, and compare every blob with its digest; exit 1 if something is wrong."""
    library = open_library(store, store_option, config, trust)
    with store_errors():
        wanted = [find_key(library, key) for key in keys] if keys else [row.key for row in list_bundles(library)]
        problems = {key: verify_bundle(library, key) for key in wanted}
    if as_json:
        print(json.dumps({key: {"ok": not found, "problems": found} for key, found in problems.items()}, indent=2))
    else:
        for key, found in problems.items():
            typer.echo(f"{key[:_KEY_LENGTH]}: {' '.join(found) or 'ok'}")
        if not problems:
            typer.echo("The store has no bundles.")
    if any(problems.values()):
        raise typer.Exit(1)


def _cells(row: Row) -> tuple[str, ...]:
    notes = [name for name, holds in (("pinned", row.is_pinned), ("being built", row.is_leased)) if holds]
    notes += ["build failed"] if row.has_failed else []
    reasons = ["by hand" if reason == Refusal.QUARANTINED else reason for reason in row.quarantine]
    notes += [f"quarantined: {', '.join(reasons)}"] if reasons else []
    sizes = f" + sizes {', '.join(map(str, row.sizes))}" if row.sizes else ""
    is_ok = row.status == "ok"
    return (
        row.key[:_KEY_LENGTH],
        row.status,
        row.model,
        row.device,
        ", ".join(row.formats) + sizes,
        decimal(row.num_bytes) if is_ok else "",
        f"{row.build_seconds:.1f} s" if is_ok else "",
        "never" if row.last_use_s is None else _day(row.last_use_s),
        "; ".join(notes),
    )


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(min(seconds, time.time())))


def _print_bundle(data: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"key {data['key']}: {data['status']}")
    for section, factors in (data["factors"] or {}).items():
        console.print(f"\n{section}:")
        for name, value in factors.items():
            if name == "sources":
                console.print(f"  sources: {count_of(len(value), 'file')}, see --json; their digests count")
                continue
            lines = [f"{name}.{part}: {item}" for part, item in value.items()] if isinstance(value, dict) else []
            for line in lines or [f"{name}: {value}"]:
                console.print(f"  {line}")
    entries = Table("kind", "name", "format", "size", "bytes", "seconds", "made by", box=None)
    for entry in data["entries"]:
        size, origin = entry["size"], entry["origin"]
        cells = [entry["kind"], entry["name"][:_KEY_LENGTH], entry["format"] or "", "" if size is None else str(size)]
        entries.add_row(*cells, decimal(entry["num_bytes"]), f"{entry['seconds']:.1f}", origin or "nobody")
    console.print()
    if data["entries"]:
        print_table(entries)
    for manifest in data["manifests"]:
        text = manifest.get("text") or f"by {', '.join(manifest['origins'])}, {manifest['creator']}"
        note = ", superseded" if manifest["is_superseded"] else ""
        console.print(f"manifest {manifest['manifest'][:_KEY_LENGTH]}{note}: {text}")
    for mark in data["quarantine"]:
        console.print(f"quarantined {mark['manifest'][:_KEY_LENGTH]} ({mark['reason']}): {mark['text']}")


def _print_explanation(console: Console, explanation: Explanation) -> None:
    if explanation.nearest is None:
        console.print("the store has no bundle to compare with")
        return
    console.print(f"nearest bundle: {explanation.nearest[:_KEY_LENGTH]}")
    sections = (
        ("differs, and so compiled code does", explanation.graph),
        ("differs, and changes only what is captured", explanation.capture),
        ("differs, and changes neither", explanation.runtime),
    )
    for title, differences in sections:
        if differences:
            print_table(_difference_table(title, differences))


def _difference_table(title: str, differences: tuple[Difference, ...]) -> Table:
    table = Table(title, "wanted", "stored", box=None)
    for item in differences:
        table.add_row(escape(item.name), escape(_short(item.wanted)), escape(_short(item.stored)))
    return table


def _short(value: Any) -> str:
    text = "-" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
