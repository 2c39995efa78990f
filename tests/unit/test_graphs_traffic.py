"""What an engine learns about its batches outlives it, adds up over replicas, and never harms it."""

from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path

import pytest

from workers.graphs import BatchHistogram, FileHistogramStore, HistogramError, Traffic
from workers.graphs import traffic as module


def _record(traffic: Traffic, num_reqs: int, count: int) -> None:
    for _ in range(count):
        traffic.record(num_reqs, num_reqs, is_decode=True)


def test_a_restart_knows_what_was_saved(tmp_path: Path) -> None:
    store = FileHistogramStore(tmp_path / "new" / "batches.json")
    first = Traffic(store)
    assert first.num_learned == 0
    _record(first, 3, 2)
    first.save()
    _record(first, 3, 1)
    first.save()
    first.save()  # nothing new
    second = Traffic(store)
    assert second.num_learned == 3
    assert second.histogram.decode == {3: 3}
    _record(second, 4, 1)
    assert second.histogram.decode == {3: 3, 4: 1}
    second.save()
    assert store.load().decode == {3: 3, 4: 1}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"batches.json", "batches.lock"}


def test_replicas_add_to_each_other(tmp_path: Path) -> None:
    store = FileHistogramStore(tmp_path / "batches.json")
    replicas = [Traffic(store), Traffic(store)]
    for traffic, num_reqs in zip(replicas, (1, 2), strict=True):
        _record(traffic, num_reqs, 5)
    for traffic in replicas:
        traffic.save()
    assert store.load().decode == {1: 5, 2: 5}
    assert replicas[0].histogram.decode == {1: 5}


def _save_often(path: Path, num_reqs: int) -> None:
    traffic = Traffic(FileHistogramStore(path))
    for _ in range(30):
        _record(traffic, num_reqs, 1)
        traffic.save()


def test_processes_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "batches.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_save_often, args=(path, num_reqs)) for num_reqs in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert FileHistogramStore(path).load().decode == {1: 30, 2: 30, 3: 30}


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"{}", b"[" * 100_000])
def test_a_file_that_cannot_be_understood_is_replaced(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "batches.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        traffic = Traffic(FileHistogramStore(path))
    assert "is ignored and will be replaced" in caplog.text
    _record(traffic, 7, 1)
    traffic.save()
    assert FileHistogramStore(path).load().decode == {7: 1}


class _BrokenStore:
    def __init__(self) -> None:
        self.is_broken = True
        self.saved = BatchHistogram()

    def load(self) -> BatchHistogram:
        raise HistogramError("not signed")

    def save(self, new: BatchHistogram) -> None:
        if self.is_broken:
            raise OSError("disk full")
        self.saved.merge(new)


def test_a_store_that_fails_is_tried_again_and_counts_nothing_twice(caplog: pytest.LogCaptureFixture) -> None:
    store = _BrokenStore()
    traffic = Traffic(store)
    assert "not signed" in caplog.text
    _record(traffic, 2, 3)
    traffic.save()
    assert "was not saved: disk full" in caplog.text
    store.is_broken = False
    traffic.save()
    traffic.save()
    assert store.saved.decode == {2: 3}


def test_saving_is_spaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "batches.json"
    traffic = Traffic(FileHistogramStore(path))
    _record(traffic, 1, 1)
    traffic.save_if_due()
    assert not path.exists()
    monkeypatch.setattr(module, "SAVE_PERIOD_S", 0.0)
    traffic.save_if_due()
    assert path.exists()


def test_without_a_store_the_process_still_learns() -> None:
    traffic = Traffic()
    _record(traffic, 2, 1)
    traffic.save()
    assert traffic.histogram.decode == {2: 1}
