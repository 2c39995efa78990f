"""Bundles: published whole, extended without overwriting, found again, put aside, explained."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.artifact_cases import KEY, PIECE, PLAN, UnreliableStore, make_library, read_all
from workers.artifacts.bundle import Bundle, unite
from workers.artifacts.digest import sha256
from workers.artifacts.errors import Refusal, RefusedError, StoreError
from workers.artifacts.key import BundleKey
from workers.artifacts.library import Addition, ArtifactLibrary, Outcome
from workers.artifacts.manifest import MANIFEST_VERSION, Entry, Kind, Manifest
from workers.artifacts.names import blob_name
from workers.artifacts.quarantine import FailureMark
from workers.artifacts.signing import SignerKey
from workers.artifacts.stores.directory import DirectoryStore
from workers.artifacts.stores.guarded import GuardedStore
from workers.config import ArtifactConfig

SIGNER, OTHER = SignerKey.generate(), SignerKey.generate()


def publish(library: ArtifactLibrary, *additions: Addition, base: Bundle | None = None) -> Bundle:
    bundle = library.publish(KEY, additions or (PLAN, PIECE), base)
    assert bundle is not None
    return bundle


def test_what_was_published_is_found() -> None:
    library = make_library(signer=SIGNER)
    assert library.open(KEY).outcome is Outcome.ABSENT
    published = publish(library)
    lookup = library.open(KEY)
    assert lookup.outcome is Outcome.HIT
    assert lookup.bundle == published
    assert read_all(library) == {"plan": PLAN.data, "first": PIECE.data}
    assert {entry.origin for entry in published.entries} == {SIGNER.key_id}
    assert published.build_seconds == PLAN.seconds + PIECE.seconds
    counters = library.counters
    assert (counters.lookups, counters.num_published) == ({"absent": 1, "hit": 1}, 1)
    assert counters.bytes_fetched == counters.bytes_published == published.num_bytes


def test_blobs_come_before_the_manifest() -> None:
    store = UnreliableStore()
    names: list[str] = []
    put = store.put_if_absent
    store.put_if_absent = lambda name, data: names.append(name) or put(name, data)  # type: ignore[assignment, method-assign, func-returns-value]
    publish(make_library(store, signer=SIGNER))
    assert [name.partition("/")[0] for name in names] == ["blobs", "blobs", "bundles"]


def test_a_bundle_is_extended_by_another_manifest() -> None:
    library = make_library(signer=SIGNER)
    first = publish(library)
    tuned = Addition(Kind.PIECE, "first", b"tuned code", format="aoti", size=8, seconds=40.0)
    second = publish(library, tuned, base=first)
    assert library.open(KEY).bundle == second
    assert [entry.slot for entry in second.entries] == [
        (Kind.PLAN, "plan", None, None),
        (Kind.PIECE, "first", "aoti", None),
        (Kind.PIECE, "first", "aoti", 8),
    ]
    assert len(library.store.list("bundles/")) == 2


def test_two_who_extend_at_once_lose_nothing() -> None:
    library = make_library(signer=SIGNER)
    base = publish(library, PLAN)
    names = [f"p{index}" for index in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: publish(library, Addition(Kind.PIECE, name, name.encode(), "fx"), base=base), names))
    united = library.open(KEY).bundle
    assert united is not None
    assert len(united.heads) == 6
    assert {entry.name for entry in united.entries} == {"plan", *names}
    merged = publish(library, PIECE, base=united)
    found = library.open(KEY).bundle
    assert found is not None
    assert found.heads == merged.heads
    assert {entry.name for entry in found.entries} == {"plan", "first", *names}


@given(st.permutations(range(4)), st.lists(st.sampled_from([1.0, 5.0]), min_size=4, max_size=4))
def test_every_reader_sees_the_same_bundle(order: list[int], clocks: list[float]) -> None:
    """Clocks only break ties: what superseded something stays newer, however its publisher's clock stood."""
    entries = [Entry(Kind.PIECE, "p", sha256(bytes([index])), 1, "fx") for index in range(4)]
    digests = [sha256(bytes([100 + index])) for index in range(4)]
    supersedes = [(), (digests[0],), (digests[1],), (digests[0],)]
    manifests = {
        digests[index]: Manifest("0" * 64, {}, (entries[index],), clocks[index], supersedes[index])
        for index in range(4)
    }
    bundle = unite({digests[index]: manifests[digests[index]] for index in order})
    assert bundle is not None
    assert set(bundle.heads) == {digests[2], digests[3]}
    assert bundle == unite(manifests)


def test_a_clock_that_is_wrong_by_years_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    library = make_library(signer=SIGNER)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    first = publish(library)
    monkeypatch.setattr(time, "time", lambda: 1e6)
    newer = dataclasses.replace(PIECE, data=b"newer code")
    publish(library, newer, base=first)
    assert read_all(library)["first"] == b"newer code"


def test_what_a_revoked_key_made_is_not_handed_on() -> None:
    store = make_library().store
    old = make_library(store, signer=OTHER, keys=(SIGNER,))
    publish(old)
    merging = make_library(store, signer=SIGNER, keys=(OTHER,))
    publish(merging, Addition(Kind.PIECE, "second", b"new", "fx"), base=merging.open(KEY).bundle)
    assert set(read_all(merging)) == {"plan", "first", "second"}
    strict = make_library(store, signer=SIGNER)
    assert strict.open(KEY).outcome is Outcome.REFUSED  # the plan was the revoked key's


def test_two_clusters_share_a_store_and_not_their_trust() -> None:
    store = make_library().store
    one, other = make_library(store, signer=SIGNER), make_library(store, signer=OTHER)
    publish(one)
    assert other.open(KEY).outcome is Outcome.REFUSED
    assert other.counters.refusals == {"unknown_signer": 1}
    publish(other)
    assert (one.open(KEY).outcome, other.open(KEY).outcome) == (Outcome.HIT, Outcome.HIT)
    assert store.list("quarantine/") == []
    assert len(store.list("blobs/")) == 2


def test_a_replica_without_a_signer_key_only_reads() -> None:
    store = make_library().store
    reader = make_library(store, keys=(SIGNER,))
    assert reader.publish(KEY, [PLAN]) is None
    assert store.list("") == []
    publish(make_library(store, signer=SIGNER))
    assert reader.open(KEY).outcome is Outcome.HIT
    assert make_library(store, signer=SIGNER, publish=False).publish(KEY, [PLAN]) is None


def test_without_trust_anything_is_used() -> None:
    library = make_library(policy="none")
    publish(library)
    assert make_library(library.store, policy="none").open(KEY).outcome is Outcome.HIT
    assert make_library(library.store, signer=SIGNER).open(KEY).outcome is Outcome.REFUSED


def test_a_bundle_without_a_plan_is_none() -> None:
    library = make_library(signer=SIGNER)
    publish(library, PIECE)
    assert library.open(KEY).outcome is Outcome.ABSENT


def test_quarantine_holds_for_the_fleet_and_is_cured_by_one_rebuild() -> None:
    store = make_library().store
    one, other = make_library(store, signer=SIGNER), make_library(store, keys=(SIGNER,))
    bad = publish(one)
    other.quarantine(bad, Refusal.SELF_CHECK, "it crashed", [sha256(PIECE.data)])
    lookup = one.open(KEY)
    assert (lookup.outcome, lookup.bad_blobs) == (Outcome.QUARANTINED, {sha256(PIECE.data)})
    again = publish(one, PLAN, dataclasses.replace(PIECE, data=b"better code"))
    assert other.open(KEY).bundle == again
    other.quarantine(again, Refusal.SELF_CHECK, "it crashed again")
    assert one.open(KEY).outcome is Outcome.BLOCKED
    for mark in one.marks.quarantined(KEY.digest):
        one.marks.lift_quarantine(mark.key, mark.manifest)
    assert one.open(KEY).outcome is Outcome.HIT


def test_what_is_in_quarantine_falls_back_to_what_it_superseded() -> None:
    library = make_library(signer=SIGNER)
    good = publish(library)
    bad = publish(library, dataclasses.replace(PIECE, data=b"bad code"), base=good)
    library.quarantine(bad, Refusal.SELF_CHECK, "wrong result", [sha256(b"bad code")])
    assert library.open(KEY).bundle == good


def test_a_mark_that_cannot_be_read_still_marks() -> None:
    library = make_library(signer=SIGNER)
    bundle = publish(library)
    library.store.put_if_absent(f"quarantine/{KEY.digest}/{bundle.heads[0]}", b"\xff")
    assert library.open(KEY).outcome is Outcome.QUARANTINED
    (mark,) = library.marks.quarantined()
    assert mark.text == "the mark itself is not readable"


def test_a_read_only_store_keeps_marks_in_the_process(tmp_path: Path) -> None:
    store = UnreliableStore()
    library = make_library(store, signer=SIGNER)
    bundle = publish(library)
    store.writing = StoreError("read-only")
    library.quarantine(bundle, Refusal.STRUCTURE, "other shapes")
    assert library.open(KEY).outcome is Outcome.QUARANTINED
    assert make_library(store, signer=SIGNER).open(KEY).outcome is Outcome.HIT


def test_failures_are_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_library().store
    one, other = (make_library(store, signer=SIGNER, failure_ttl_s=100.0) for _ in range(2))
    assert one.recent_failure(KEY) is None
    one.remember_failure(KEY, "ptxas failed")
    failure = other.recent_failure(KEY)
    assert isinstance(failure, FailureMark)
    assert failure.text == "ptxas failed"
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 101)
    assert other.recent_failure(KEY) is None
    # The mark of a host whose clock is a year ahead does not hold for a year.
    monkeypatch.setattr(time, "time", lambda: now_s - 365 * 86400)
    assert other.recent_failure(KEY) is None
    monkeypatch.setattr(time, "time", lambda: now_s)
    other.marks.forget_failures(KEY.digest)
    assert make_library(store, signer=SIGNER).recent_failure(KEY) is None


@pytest.mark.parametrize("reading", [True, False])
def test_a_store_in_trouble_is_an_outcome(reading: bool, caplog: pytest.LogCaptureFixture) -> None:
    inner = UnreliableStore()
    library = make_library(GuardedStore(inner, 5), signer=SIGNER)
    publish(library)
    inner.writing = StoreError("disk full")
    inner.reading = StoreError("unreachable") if reading else None
    assert library.open(KEY).outcome is (Outcome.UNAVAILABLE if reading else Outcome.HIT)
    assert library.publish(KEY, [PLAN]) is None
    assert library.recent_failure(KEY) is None
    assert (library.peek(KEY) is None) is reading
    assert "not published: disk full" in caplog.text
    assert make_library(inner, signer=SIGNER).open(BundleKey({})).outcome is not Outcome.HIT


def test_a_full_disk_publishes_nothing_half(tmp_path: Path) -> None:
    store = UnreliableStore()
    library = make_library(store, signer=SIGNER)
    put, calls = store.put_if_absent, itertools.count()

    def full_after_two(name: str, data: bytes) -> bool:
        if next(calls) >= 2:
            raise StoreError("disk full")
        return put(name, data)

    store.put_if_absent = full_after_two  # type: ignore[method-assign]
    assert library.publish(KEY, [PLAN, PIECE]) is None
    assert library.open(KEY).outcome is Outcome.ABSENT


def test_a_damaged_blob_is_replaced_by_whoever_builds_it_again() -> None:
    library = make_library(signer=SIGNER)
    bundle = publish(library)
    name = blob_name(sha256(PIECE.data))
    library.store.delete(name)
    library.store.put_if_absent(name, b"Machine code")
    with pytest.raises(RefusedError, match="not those that were signed") as error:
        read_all(library)
    assert error.value.reason is Refusal.DAMAGED_BLOB
    assert library.open(KEY).outcome is Outcome.QUARANTINED
    publish(library)
    assert read_all(library)["first"] == PIECE.data
    # One that was damaged and never read is healed too.
    library.store.delete(name)
    library.store.put_if_absent(name, b"Machine code")
    publish(library, base=bundle)
    assert library.store.get(name, 100) == PIECE.data


def test_a_miss_names_the_factors_that_differ() -> None:
    library = make_library(signer=SIGNER)
    publish(library)
    other = {**KEY.graph, "environment": {"torch": "2.13", "num_threads": 4}}
    far = BundleKey({"environment": {"torch": "2.11", "num_threads": 8}, "dtype": "float32"})
    assert library.publish(far, [PLAN]) is not None
    lookup = library.open(BundleKey(other, {"sizes": [2]}, KEY.runtime))
    assert lookup.outcome is Outcome.ABSENT
    assert lookup.differing == ("environment.num_threads",)
    explanation = lookup.explanation
    assert explanation is not None
    assert explanation.nearest == KEY.digest
    assert explanation.sentence() == (
        f"the nearest bundle {KEY.digest[:16]} differs in 1: environment.num_threads is 4, there 2"
    )
    assert [item.name for item in explanation.capture] == ["sizes"]
    assert explanation.runtime == ()
    assert library.counters.misses == {"environment.num_threads": 1}


def test_labels_have_few_values() -> None:
    library = make_library(signer=SIGNER)
    graph = {"sources": {f"file{index}.py": "a" for index in range(9)}, "model": {"layers": 2, "width": 8}}
    library.publish(BundleKey(graph), [PLAN])
    changed = {"sources": {f"file{index}.py": "b" for index in range(9)}, "model": {"layers": 3, "width": 9}}
    explanation = library.explain(BundleKey(changed))
    assert len(explanation.graph) == 11
    assert explanation.label == "model,sources"
    assert make_library(signer=SIGNER).explain(KEY).label == "no_bundle"


def test_only_so_many_hosts_histograms_are_kept() -> None:
    library = make_library(signer=SIGNER)
    bundle = publish(library, PLAN)
    for index in range(40):
        bundle = publish(library, Addition(Kind.HISTOGRAM, f"host{index}", b"%d" % index), base=bundle)
    publish(library, Addition(Kind.HISTOGRAM, "host8", b"again"), base=bundle)
    found = library.open(KEY).bundle
    assert found is not None
    assert [entry.name for entry in found.find(Kind.HISTOGRAM)] == [
        *(f"host{index}" for index in range(9, 40)),
        "host8",
    ]


def test_pieces_are_found_under_equal_conditions() -> None:
    library = make_library(signer=SIGNER)
    publish(library)
    same = BundleKey({**KEY.graph, "dtype": "float32"})
    assert [entry.name for _, entry in library.find_builds(same, ["environment"])] == ["first"]
    assert list(library.find_builds(same, ["environment", "dtype"])) == []
    assert list(library.find_builds(KEY, ["environment"])) == []


def test_a_manifest_of_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    library = make_library(signer=SIGNER)
    monkeypatch.setattr("workers.artifacts.manifest.MANIFEST_VERSION", MANIFEST_VERSION + 1)
    publish(library)
    monkeypatch.undo()
    assert library.open(KEY).outcome is Outcome.REFUSED
    assert library.counters.refusals == {"other_version": 1}
    assert library.store.list("quarantine/") == []


def test_uses_are_noted_once_a_day() -> None:
    library = make_library(signer=SIGNER)
    publish(library)
    for _ in range(3):
        library.open(KEY)
    deadline = time.monotonic() + 5
    while not library.store.list("uses/") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(library.store.list("uses/")) == 1


def test_a_directory_serves_processes_and_restarts(tmp_path: Path) -> None:
    config = ArtifactConfig(store=str(tmp_path / "shared"))
    published = publish(ArtifactLibrary.from_config(config, tmp_path))
    assert ArtifactLibrary.from_config(config, tmp_path).open(KEY).bundle == published
    envelope = json.loads(next((tmp_path / "shared" / "bundles" / KEY.digest).iterdir()).read_bytes())
    assert set(envelope) == {"payload", "payloadType", "signatures"}
    assert {item.name.partition("/")[0] for item in DirectoryStore(tmp_path / "shared").list("")} >= {
        "blobs",
        "bundles",
    }
