"""Batch sizes of several hosts, shared beside the pieces of a bundle."""

from __future__ import annotations

from pathlib import Path

from workers.artifacts.key import BundleKey
from workers.artifacts.library import Addition, ArtifactLibrary
from workers.artifacts.manifest import Kind
from workers.graphs import BatchHistogram
from workers.graphs.traffic import FileHistogramStore
from workers.runner.shared_traffic import SharedHistogramStore, host_name

KEY = BundleKey(graph={"model": "a"}, capture={}, runtime={})


def seen(*num_reqs: int) -> BatchHistogram:
    histogram = BatchHistogram()
    for count in num_reqs:
        histogram.record(count, count, is_decode=True)
    return histogram


def library_with_pieces() -> ArtifactLibrary:
    library = ArtifactLibrary.in_memory()
    library.publish(KEY, [Addition(Kind.PLAN, "plan", b"{}")])
    return library


def test_hosts_see_each_others_batches_and_count_none_twice(tmp_path: Path) -> None:
    library = library_with_pieces()
    stores = [
        SharedHistogramStore(FileHistogramStore(tmp_path / f"{host}.json"), host, library, KEY) for host in ("a", "b")
    ]
    stores[0].save(seen(3, 3, 5))
    stores[1].save(seen(7))
    for store in stores:
        store.wait()
    for store in stores:
        assert dict(store.load().decode) == {3: 2, 5: 1, 7: 1}
    # Another process of the first host, whose first save publishes the host's new total in place of the old one.
    again = SharedHistogramStore(FileHistogramStore(tmp_path / "a.json"), "a", library, KEY)
    again.save(seen(3))
    again.wait()
    assert dict(stores[1].load().decode) == {3: 3, 5: 1, 7: 1}
    bundle = library.peek(KEY)
    assert bundle is not None
    assert sorted(entry.name for entry in bundle.find(Kind.HISTOGRAM)) == ["a", "b"]
    assert bundle.first(Kind.PLAN) is not None


def test_without_pieces_batches_stay_on_the_host(tmp_path: Path) -> None:
    library = ArtifactLibrary.in_memory()
    store = SharedHistogramStore(FileHistogramStore(tmp_path / "a.json"), "a", library, KEY)
    store.save(seen(2))
    store.wait()
    assert library.peek(KEY) is None
    assert dict(store.load().decode) == {2: 1}


def test_what_is_not_a_histogram_is_left_out(tmp_path: Path) -> None:
    library = library_with_pieces()
    library.publish(KEY, [Addition(Kind.HISTOGRAM, "b", b'{"version": 99}')], library.peek(KEY))
    store = SharedHistogramStore(FileHistogramStore(tmp_path / "a.json"), "a", library, KEY)
    store.save(seen(2))
    store.wait()
    assert dict(store.load().decode) == {2: 1}


def test_a_host_keeps_its_name(tmp_path: Path) -> None:
    name = host_name(tmp_path / "traffic")
    assert host_name(tmp_path / "traffic") == name
    assert host_name(tmp_path / "other") != name
