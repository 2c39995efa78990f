"""Arguments that several sub-commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(help="The deployment's YAML file, e.g. configs/smollm2-cpu.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one value, e.g. --set models.0.replicas.num_replicas=1. Repeatable."),
]
ModelName = Annotated[str | None, typer.Option("--model", help="Which of the config's models, if there are several.")]
