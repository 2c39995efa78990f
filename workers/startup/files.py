"""Accounts of past starts as JSON files of one folder, the newest of them kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from workers.errors import ConfigError
from workers.startup.report import StartupReport

logger = logging.getLogger(__name__)

#: Files kept in a folder.
_KEPT = 50


def write_report(folder: Path, report: StartupReport) -> None:
    """Keep the account, in place of an earlier state of the same start; trouble is logged, never raised."""
    stamp = report.started_at.replace(":", "").replace("-", "").partition(".")[0]
    path = folder / f"{stamp}-{report.host}-{report.pid}.json"
    scratch = path.with_suffix(".new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
        scratch.replace(path)
        for old in sorted(folder.glob("*.json"))[:-_KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the account of this start could not be written: %s", error)


def read_report(path: Path) -> StartupReport:
    """The account in a file, or the newest in a folder.

    Raises:
        ConfigError: There is none, or it is something else.
    """
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise ConfigError(f"{path} holds no account of a start; start an engine first, or give --url or --file.")
        path = files[-1]
    try:
        return StartupReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: no engine has left an account there; start one first, or give --url or --file."
        ) from None
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is {error}.") from None
