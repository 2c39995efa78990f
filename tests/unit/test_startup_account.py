"""The account of a start: phases as a tree over threads, moments, files."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from workers.errors import ConfigError
from workers.startup.account import StartupAccount
from workers.startup.files import read_report, write_report
from workers.startup.report import LookupRow, StartupReport


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def example() -> StartupReport:
    clock = Clock()
    account = StartupAccount("tiny on cpu", clock=clock)
    with account.phase("weights") as weights:
        clock.now_s += 2.0
        with account.phase("read"):
            clock.now_s += 1.0
        weights.num_bytes = 1000
    account.looked_up(LookupRow("artifacts", False, reason="torch differs"))
    account.looked_up(LookupRow("histogram", True, num_bytes=10, saved_s=1.5))
    account.mark("ready")
    clock.now_s += 1.0
    account.mark("first_token")
    account.mark("first_token")
    clock.now_s += 9.0
    return account.report()


def test_phases_of_one_thread_are_a_tree() -> None:
    report = example()
    weights, read = report.phases
    assert (weights.name, weights.start_s, weights.end_s, weights.parent, weights.num_bytes) == (
        "weights",
        0.0,
        3.0,
        None,
        1000,
    )
    assert (read.name, read.start_s, read.end_s, read.parent) == ("read", 2.0, 3.0, 0)
    assert (report.ready_s, report.first_token_s, report.swapped_s) == (3.0, 4.0, None)
    assert report.saved_s == 1.5
    assert report.title == "tiny on cpu"


def test_phases_of_threads_overlap_and_do_not_nest() -> None:
    account = StartupAccount()
    begun, done = threading.Event(), threading.Event()

    def fetch() -> None:
        with account.phase("fetch"):
            begun.set()
            assert done.wait(10)

    thread = threading.Thread(target=fetch)
    with account.phase("weights"):
        thread.start()
        assert begun.wait(10)
        running = {phase.name: phase for phase in account.report().phases}
        assert running["fetch"].parent is None
        assert running["fetch"].end_s is None
        done.set()
        thread.join()
    fetch_row, weights = sorted(account.report().phases, key=lambda phase: phase.name)
    assert weights.start_s <= fetch_row.start_s
    assert fetch_row.end_s is not None
    assert weights.end_s is not None
    assert fetch_row.end_s <= weights.end_s


def test_a_phase_ends_even_if_it_fails() -> None:
    account = StartupAccount()
    with pytest.raises(RuntimeError), account.phase("load"):
        raise RuntimeError
    with account.phase("build"):
        pass
    load, build = account.report().phases
    assert load.end_s is not None
    assert build.parent is None


def test_seconds_of_phases_with_one_name_count_once() -> None:
    account = StartupAccount(origin_s=0.0)
    for start_s, end_s in ((1.0, 3.0), (2.0, 4.0), (3.0, 3.5), (6.0, 7.0)):
        account.add("load", start_s, end_s)
    assert account.report().seconds("load") == pytest.approx(4.0)
    assert account.report().seconds("fetch") == 0.0


def test_a_report_goes_through_json() -> None:
    report = example()
    assert StartupReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    with pytest.raises(ValueError, match="not the account"):
        StartupReport.from_dict({"phases": []})


def test_files_keep_the_newest_state_of_a_start(tmp_path: Path) -> None:
    report = example()
    for _ in range(2):
        write_report(tmp_path / "startup", report)
    (file,) = (tmp_path / "startup").iterdir()
    assert read_report(file) == read_report(tmp_path / "startup") == report


def test_files_that_are_not_there_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no account"):
        read_report(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_report(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="not the account"):
        read_report(tmp_path)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    write_report(tmp_path / "file", example())


def test_the_first_account_of_a_process_begins_with_the_process() -> None:
    code = """
import time
time.sleep(0.3)
import workers.startup.account as a
time.sleep(0.2)
first, second = a.StartupAccount.of_process(), a.StartupAccount.of_process()
process, imports = first.report().phases
assert process.start_s == 0.0 and process.end_s >= 0.3, process
assert imports.start_s == process.end_s and imports.end_s - imports.start_s >= 0.2, imports
assert first.report().process_age_s == 0.0
assert not second.report().phases and second.report().process_age_s >= 0.5
import sys
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
