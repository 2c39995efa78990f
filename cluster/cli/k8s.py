"""``warmgraph k8s``: Kubernetes manifests made from a deployment config."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.options import ConfigPath, Overrides
from cluster.config import DeploymentConfig
from cluster.k8s import DEFAULT_IMAGE, ray_service, to_yaml

app = typer.Typer(name="k8s", help="Make Kubernetes manifests from a config.", no_args_is_help=True)


@app.command()
def render(
    config: ConfigPath,
    overrides: Overrides = None,
    image: Annotated[str, typer.Option(help="Container image with warmgraph installed.")] = DEFAULT_IMAGE,
) -> None:
    """Print a RayService that runs the deployment."""
    manifest = ray_service(DeploymentConfig.from_file(config, overrides), image)
    print(to_yaml(manifest), end="")


@app.callback()
def _group() -> None:
    """Make Kubernetes manifests from a config."""
