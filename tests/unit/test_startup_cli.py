"""``warmgraph startup show``: the waterfall of a kept account, and of a server's replicas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.startup import app, waterfall
from workers.errors import UserError
from workers.startup.account import StartupAccount
from workers.startup.files import write_report
from workers.startup.report import LookupRow, StartupReport


def example() -> StartupReport:
    now = [0.0]
    account = StartupAccount("tiny on cpu", clock=lambda: now[0])
    with account.phase("compile"):
        now[0] += 1.0
        with account.phase("fetch") as fetch:
            now[0] += 1.0
            fetch.num_bytes, fetch.note = 2_000_000, "from the store"
    account.add("CUDA driver", 0.0, 0.5)
    account.looked_up(LookupRow("artifacts", True, num_bytes=2_000_000, saved_s=12.5))
    account.looked_up(LookupRow("memory plan", False, reason="absent"))
    account.mark("ready")
    return account.report()


def show(*arguments: str, columns: int = 140) -> str:
    result = CliRunner().invoke(app, ["show", *arguments], catch_exceptions=False, env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    return result.output


def test_the_newest_account_is_drawn(tmp_path: Path) -> None:
    write_report(tmp_path, example())
    output = show("--file", str(tmp_path))
    lines = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    assert "2.00" in lines["compile"]
    assert lines["fetch"].startswith("  fetch"), "below its parent"
    assert "2.0 MB" in lines["fetch"]
    assert "from the store" in lines["fetch"]
    assert lines["fetch"].index("█") > lines["compile"].index("█")
    assert "ready after 2.00 s" in output
    assert "artifacts: hit, 2.0 MB, saved 12.5 s" in output
    assert "memory plan: miss: absent" in output


def test_json(tmp_path: Path) -> None:
    write_report(tmp_path, example())
    (report,) = json.loads(show("--file", str(tmp_path), "--json")).values()
    assert report == example().to_dict() | {
        "started_at": report["started_at"],
        "process_age_s": report["process_age_s"],
    }
    assert report["saved_s"] == 12.5


def test_phases_that_still_run_reach_the_end() -> None:
    now = [0.0]
    account = StartupAccount(clock=lambda: now[0])
    with account.phase("weights"):
        now[0] += 3.0
        account.add("tokenizer", 0.0, 3.0)
        table = waterfall(account.report(), 80)
    assert "running" in list(table.columns[3].cells)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_bars_fit_the_terminal_and_notes_are_not_folded(columns: int, tmp_path: Path) -> None:
    now = [0.0]
    account = StartupAccount(clock=lambda: now[0])
    for name in ("weights", "wait for what was begun ahead"):
        with account.phase(name) as phase:
            now[0] += 2.0
            phase.num_bytes = 123_456_789
            phase.note = "passed before on this node"
    write_report(tmp_path, account.report())
    rows = [line for line in show("--file", str(tmp_path), columns=columns).splitlines() if "█" in line]
    assert len(rows) == 2
    assert all(row.rstrip().endswith("passed before on this node") for row in rows)
    ends = [row.rindex("█") + 1 for row in rows]
    assert ends[0] < ends[1] <= max(columns, 60)


def test_both_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not both"):
        show("--file", str(tmp_path), "--url", "http://127.0.0.1:1")
