"""Which store the commands of ``warmgraph artifacts`` look at, and as whom."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from cluster.config import DeploymentConfig
from workers.artifacts.errors import RefusedError, StoreError
from workers.artifacts.library import ArtifactLibrary
from workers.config import ArtifactConfig
from workers.errors import ConfigError, UserError

Key = Annotated[str, typer.Argument(help="The key, or enough of its beginning.")]
Store = Annotated[
    str | None, typer.Option("--store", help="A path or s3://, gs://, az:// URL; this user's own store by default.")
]
StoreOption = Annotated[
    list[str] | None, typer.Option("--store-option", help="For an object store, e.g. endpoint=http://... Repeatable.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Take store, keys and limits from this deployment's first model.")
]
Trusted = Annotated[
    list[str] | None,
    typer.Option("--trust", help="Trust these verifier keys, as ed25519:... or files. By default, this user's own."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def artifact_config(
    store: str | None, options: list[str] | None, config: Path | None, trusted: list[str] | None
) -> ArtifactConfig:
    """The artifact section that these options describe.

    Raises:
        ConfigError: Options contradict each other, or the config is wrong.
    """
    if config is not None:
        if store or options or trusted:
            raise ConfigError("Give --config, or --store, --store-option and --trust, not both.")
        return DeploymentConfig.from_file(config).models[0].engine.artifacts
    pairs = [option.partition("=") for option in options or []]
    for name, separator, _ in pairs:
        if not separator:
            raise ConfigError(f"--store-option takes name=value, got {name!r}.")
    return ArtifactConfig(
        store=store or "local",
        store_options={name: value for name, _, value in pairs},
        trust="signed" if trusted else "local-only",
        verifier_keys=trusted or [],
        local_tier=False,
    )


def open_library(
    store: str | None, options: list[str] | None, config: Path | None, trusted: list[str] | None
) -> ArtifactLibrary:
    """The library to look at.

    Raises:
        ConfigError: See :func:`artifact_config`; also, a config whose store is in memory has nothing to look at.
    """
    found = artifact_config(store, options, config, trusted)
    if found.store is None:
        raise ConfigError(f"{config}: artifacts.store is null, so nothing outlives an engine.", param="store")
    return ArtifactLibrary.from_config(found)


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """What a store or its contents are to blame for, as an error for the command's user."""
    try:
        yield
    except (StoreError, RefusedError) as error:
        raise UserError(str(error)) from error
