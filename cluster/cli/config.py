"""``warmgraph config``: show and check deployment configs."""

from __future__ import annotations

import json
from typing import Annotated

import typer
import yaml
from rich.console import Console

from cluster.cli.options import ConfigPath, Overrides
from cluster.config import DeploymentConfig

app = typer.Typer(name="config", help="Show and check deployment configs.", no_args_is_help=True)


@app.command()
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Print the resolved config, every default filled in."""
    data = DeploymentConfig.from_file(config, overrides).to_dict()
    print(json.dumps(data, indent=2) if as_json else yaml.safe_dump(data, sort_keys=False), end="")


@app.command()
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config, and say what to change if it is wrong."""
    loaded = DeploymentConfig.from_file(config, overrides)
    names = ", ".join(model.name for model in loaded.models)
    Console().print(f"{config}: ok ({names})", highlight=False)
