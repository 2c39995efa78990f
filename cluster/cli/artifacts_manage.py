"""``warmgraph artifacts``: the commands that change a store, move bundles, and make keys."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from cluster.cli.artifact_options import ConfigFile, Json, Key, Store, StoreOption, Trusted, open_library, store_errors
from cluster.cli.output import count_of
from workers.artifacts.catalog import find_key
from workers.artifacts.errors import Refusal
from workers.artifacts.gc import GcPolicy, collect
from workers.artifacts.names import PINS, last_part, manifest_prefix
from workers.artifacts.signing import SignerKey
from workers.artifacts.transfer import Transfer, export_bundles, import_bundles
from workers.errors import ConfigError

_DAY_S = 24 * 3600.0
_HOUR_S = 3600.0


def add_commands(app: typer.Typer) -> None:
    """Put the commands into the group."""
    app.command("gc")(gc_command)
    app.command("pin")(pin_command)
    app.command("quarantine")(quarantine_command)
    app.command("export")(export_command)
    app.command("import")(import_command)
    app.command("keygen")(keygen_command)


def gc_command(
    max_age_days: Annotated[
        float | None, typer.Option(help="Remove bundles not used for this long; a day of use counts to its end.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Remove those used longest ago until this is met.")] = None,
    grace_hours: Annotated[float, typer.Option(help="Touch nothing that was made or used within this time.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: Store = None,
    store_option: StoreOption = None,
    config: ConfigFile = None,
    trust: Trusted = None,
    as_json: Json = False,
) -> None:
    """Remove bundles by age and size, and what nothing names any more; never pinned or leased ones."""
    library = open_library(store, store_option, config, trust)
    age_s = None if max_age_days is None else max_age_days * _DAY_S
    with store_errors():
        plan = collect(library, GcPolicy(age_s, max_bytes, grace_hours * _HOUR_S), dry_run=dry_run)
    if as_json:
        print(json.dumps(dataclasses.asdict(plan) | {"dry_run": dry_run}, indent=2))
        return
    verb = "would remove" if dry_run else "removed"
    what = f"{count_of(len(plan.keys), 'bundle')}, {count_of(len(plan.names), 'object')}, {decimal(plan.num_bytes)}"
    typer.echo(f"{verb} {what}")
    for key, reason in plan.kept.items():
        typer.echo(f"kept {key[:12]}: {reason}")


def pin_command(
    key: Key,
    remove: Annotated[bool, typer.Option("--remove", help="Let it be collected again.")] = False,
    store: Store = None,
    store_option: StoreOption = None,
    config: ConfigFile = None,
    trust: Trusted = None,
    as_json: Json = False,
) -> None:
    """Keep a bundle from garbage collection."""
    library = open_library(store, store_option, config, trust)
    with store_errors():
        found = find_key(library, key)
        if remove:
            library.store.delete(f"{PINS}{found}")
        else:
            library.store.put_if_absent(f"{PINS}{found}", str(int(time.time())).encode())
    _say({"key": found, "is_pinned": not remove}, f"{found[:12]} is {'no longer ' if remove else ''}pinned", as_json)


def quarantine_command(
    key: Annotated[str | None, typer.Argument(help="The key, or its beginning; all marks if left out.")] = None,
    reason: Annotated[str | None, typer.Option(help="Mark the bundle bad for the whole fleet, and why.")] = None,
    lift: Annotated[bool, typer.Option("--lift", help="Take marks and remembered failures of the key back.")] = False,
    store: Store = None,
    store_option: StoreOption = None,
    config: ConfigFile = None,
    trust: Trusted = None,
    as_json: Json = False,
) -> None:
    """List what is in quarantine; with --reason put a bundle there, with --lift take it out."""
    library = open_library(store, store_option, config, trust)
    if key is None and (reason or lift):
        raise ConfigError("Name the bundle: its key, or enough of its beginning.", param="key")
    with store_errors():
        found = find_key(library, key) if key is not None else ""
        if reason is not None:
            manifests = [last_part(item.name) for item in library.store.list(manifest_prefix(found))]
            library.marks.quarantine(found, manifests, Refusal.QUARANTINED, reason, ())
        lifted = library.marks.quarantined(found) if lift else []
        if lift:
            for mark in lifted:
                library.marks.lift_quarantine(mark.key, mark.manifest)
            library.marks.forget_failures(found)
        marks = library.marks.quarantined(found)
    if as_json:
        print(json.dumps([dataclasses.asdict(mark) for mark in marks], indent=2))
        return
    for mark in marks:
        reason = "by hand" if mark.reason is Refusal.QUARANTINED else mark.reason
        typer.echo(f"{mark.key[:12]} manifest {mark.manifest[:12]}, {reason}: {mark.text}")
    if lift:
        typer.echo(f"{found[:12]}: {count_of(len(lifted), 'mark')} taken back; a failed build is no longer remembered")
    elif not marks:
        typer.echo("Nothing is in quarantine.")


def export_command(
    path: Annotated[Path, typer.Argument(help="The file to write.")],
    keys: Annotated[list[str], typer.Argument(help="Keys, or enough of their beginnings.")],
    store: Store = None,
    store_option: StoreOption = None,
    config: ConfigFile = None,
    trust: Trusted = None,
    as_json: Json = False,
) -> None:
    """Write bundles, with their signatures, to one file."""
    library = open_library(store, store_option, config, trust)
    with store_errors():
        transfer = export_bundles(library, [find_key(library, key) for key in keys], path)
    _say_transfer(transfer, f"wrote {path}", as_json)


def import_command(
    path: Annotated[Path, typer.Argument(help="A file that `warmgraph artifacts export` wrote.")],
    store: Store = None,
    store_option: StoreOption = None,
    config: ConfigFile = None,
    trust: Trusted = None,
    as_json: Json = False,
) -> None:
    """Verify an exported file and put its bundles into the store; nothing is written if any of it is not trusted."""
    library = open_library(store, store_option, config, trust)
    with store_errors():
        transfer = import_bundles(library, path)
    _say_transfer(transfer, f"imported {path}", as_json)


def keygen_command(
    path: Annotated[Path, typer.Argument(help="Where to write the private key; there must be no file yet.")],
    as_json: Json = False,
) -> None:
    """Make a signer key, and print the verifier key that belongs to it."""
    signer = SignerKey.generate()
    try:
        is_new = signer.write(path)
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror}.", param="path") from error
    if not is_new:
        raise ConfigError(f"{path} exists; keys are never overwritten.", param="path")
    text = signer.verifier.to_text()
    _say({"signer_key_file": str(path), "key_id": signer.key_id, "verifier_key": text}, text, as_json)


def _say(data: dict[str, object], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(data) if as_json else text)


def _say_transfer(transfer: Transfer, text: str, as_json: bool) -> None:
    num_objects, num_bytes = count_of(transfer.num_objects, "object"), decimal(transfer.num_bytes)
    what = f"{count_of(len(transfer.keys), 'bundle')}, {num_objects} that were not there, {num_bytes}"
    _say(dataclasses.asdict(transfer), f"{text}: {what}", as_json)
