"""``warmgraph analyze plot``: draw the chart of an earlier ``--json`` output, on this machine instead of that one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.plot import Chart, write_chart
from workers.errors import ConfigError


def plot(
    result: Annotated[Path, typer.Argument(help="What --json printed, or a benchmark's last line.")],
    picture: Annotated[Path, typer.Argument(help="The .png or .svg file to draw.")],
) -> None:
    """Draw the chart inside a JSON result."""
    write_chart(_read(result), picture)


def _read(path: Path) -> Chart:
    try:
        return Chart.from_dict(json.loads(path.read_text(encoding="utf-8"))["chart"])
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} holds no chart: give what a command printed with --json.") from None
