"""What garbage collection takes, and what it never takes."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.artifact_cases import PIECE, PLAN, make_library, read_all
from workers.artifacts.bundle import Bundle
from workers.artifacts.digest import sha256
from workers.artifacts.errors import Refusal
from workers.artifacts.gc import GcPolicy, Inventory, StoredManifest, collect, plan_collection, take_inventory
from workers.artifacts.key import BundleKey
from workers.artifacts.library import Addition, ArtifactLibrary, Outcome
from workers.artifacts.manifest import Kind
from workers.artifacts.names import blob_name
from workers.artifacts.signing import SignerKey
from workers.artifacts.stores.base import StoredObject
from workers.artifacts.stores.directory import DirectoryStore

SIGNER = SignerKey.generate()
DAY_S = 86400.0
NOW_S = 1000 * DAY_S


def key(index: int) -> BundleKey:
    return BundleKey({"index": index})


def make(library: ArtifactLibrary, index: int, base: Bundle | None = None, data: bytes | None = None) -> Bundle:
    own = Addition(Kind.PIECE, "own", data or b"code %d" % index, "aoti")
    bundle = library.publish(key(index), [PLAN, PIECE, own], base)
    assert bundle is not None
    return bundle


def age(library: ArtifactLibrary, days: float) -> None:
    """Make everything in a directory so many days old."""
    assert isinstance(library.store, DirectoryStore)
    for item in library.store.list(""):
        os.utime(library.store.root / item.name, (time.time() - days * DAY_S,) * 2)


def wait_for_uses(library: ArtifactLibrary, count: int) -> None:
    deadline = time.monotonic() + 5
    while len(library.store.list("uses/")) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_old_bundles_go_with_their_blobs(tmp_path: Path) -> None:
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)
    make(library, 0)
    age(library, 10)
    make(library, 1)
    policy = GcPolicy(max_age_s=5 * DAY_S)
    dry = collect(library, policy, dry_run=True)
    assert library.open(key(0)).outcome is Outcome.HIT
    wait_for_uses(library, 1)
    age_of_use = library.store.list("uses/")[0]
    library.store.delete(age_of_use.name)
    plan = collect(library, policy)
    assert plan == dry
    assert plan.keys == (key(0).digest,)
    assert library.open(key(0)).outcome is Outcome.ABSENT
    # What they have in common stays, and so the other one is whole.
    assert set(read_all(library, key(1))) == {"plan", "first", "own"}
    assert library.store.get(blob_name(sha256(b"code 0")), 100) is None
    assert plan.num_bytes >= len(b"code 0")


def test_a_use_keeps_a_bundle(tmp_path: Path) -> None:
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)
    make(library, 0)
    age(library, 10)
    library.open(key(0))
    wait_for_uses(library, 1)
    assert collect(library, GcPolicy(max_age_s=5 * DAY_S)).keys == ()


def test_pinned_and_leased_bundles_stay(tmp_path: Path) -> None:
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)
    for index in range(3):
        make(library, index)
    library.store.put_if_absent(f"pins/{key(0).digest}", b"")
    library.store.put_if_absent(f"builds/{key(2).digest}/1", b"its builder died")
    age(library, 10)
    policy = GcPolicy(max_age_s=DAY_S, max_bytes=0)
    with library.building(key(1)):
        # Whoever collects sees the store and nothing else: no lease folder, no cluster.
        plan = collect(make_library(DirectoryStore(tmp_path), signer=SIGNER), policy)
    assert plan.keys == (key(2).digest,)
    assert plan.names[-1] == f"builds/{key(2).digest}/1"
    assert set(plan.kept) == {key(0).digest, key(1).digest}
    assert library.open(key(0)).outcome is Outcome.HIT
    assert make(library, 1) is not None
    library.end_build(key(1))
    assert library.store.list("builds/") == []
    age(library, 10)
    assert set(collect(library, policy, dry_run=True).keys) == {key(1).digest}


@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_is_wrong_by_a_year_changes_nothing(
    days: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)
    for index in range(3):
        make(library, index)
    age(library, 10)
    make(library, 3)
    policy = GcPolicy(max_age_s=5 * DAY_S)
    with library.building(key(1)), monkeypatch.context() as patch:
        real = time.time
        patch.setattr(time, "time", lambda: real() + days * DAY_S)
        plan = collect(library, policy, dry_run=True)
    assert set(plan.keys) == {key(0).digest, key(2).digest}
    assert set(plan.kept) == {key(1).digest}
    assert library.store.list("clock/") == []


def test_a_build_that_fails_leaves_no_mark(tmp_path: Path) -> None:
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)

    def build() -> None:
        with library.building(key(0)):
            assert take_inventory(library, time.time()).leased == {key(0).digest}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert library.store.list("builds/") == []


def test_who_does_not_publish_marks_nothing(tmp_path: Path) -> None:
    """A reader of a store may not be able to write to it at all."""
    library = make_library(DirectoryStore(tmp_path), keys=(SIGNER,))
    with library.building(key(0)):
        assert library.store.list("builds/") == []


def test_the_size_is_met_by_those_used_longest_ago(tmp_path: Path) -> None:
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)
    for index in range(4):
        make(library, index, data=bytes([65 + index]) * 1000)
    age(library, 20)
    for index in range(4):
        (item,) = library.store.list(f"bundles/{key(index).digest}/")
        os.utime(tmp_path / item.name, (time.time() - (10 - index) * DAY_S,) * 2)
    plan = collect(library, GcPolicy(max_bytes=2500, grace_s=DAY_S))
    assert set(plan.keys) == {key(0).digest, key(1).digest}


def test_what_was_superseded_goes_after_a_while(tmp_path: Path) -> None:
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)
    base = make(library, 0, data=b"old code")
    make(library, 0, base, data=b"new code")
    assert collect(library, GcPolicy()).names == ()
    age(library, 2)
    plan = collect(library, GcPolicy())
    assert (plan.keys, len(plan.names)) == ((), 2)
    assert library.store.get(blob_name(sha256(b"old code")), 100) is None
    assert read_all(library, key(0))["own"] == b"new code"


def test_what_is_in_quarantine_goes_and_its_mark_stays(tmp_path: Path) -> None:
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)
    bad = make(library, 0)
    library.quarantine(bad, Refusal.SELF_CHECK, "crashed", [sha256(b"code 0")])
    age(library, 2)
    collect(library, GcPolicy())
    assert library.store.list("bundles/") == library.store.list("blobs/") == []
    assert [mark.text for mark in library.marks.quarantined()] == ["crashed"]


def test_blobs_of_a_manifest_to_come_stay(tmp_path: Path) -> None:
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)
    library.store.put_if_absent(blob_name(sha256(b"code 0")), b"code 0")
    assert collect(library, GcPolicy(max_age_s=0, max_bytes=0)).names == ()
    age(library, 2)
    assert len(collect(library, GcPolicy()).names) == 1


def test_manifests_that_cannot_be_read_keep_their_blobs(tmp_path: Path) -> None:
    """Another cluster's, or a later version's: what they name is not known."""
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)
    library.store.put_if_absent(blob_name(sha256(b"theirs")), b"theirs")
    library.store.put_if_absent(f"bundles/{key(5).digest}/{'0' * 64}", b"from the future")
    age(library, 2)
    assert collect(library, GcPolicy()).names == ()


def test_another_clusters_bundles_are_counted_like_ones_own(tmp_path: Path) -> None:
    theirs = make_library(DirectoryStore(tmp_path), signer=SignerKey.generate())
    make(theirs, 0)
    age(theirs, 2)
    collect(make_library(DirectoryStore(tmp_path), signer=SIGNER), GcPolicy())
    assert theirs.open(key(0)).outcome is Outcome.HIT


def test_collecting_while_replicas_start_and_publish(tmp_path: Path) -> None:
    """With everything old but what is in use, no start and no publication ever fails."""
    library = make_library(DirectoryStore(tmp_path), signer=SIGNER)
    for index in range(8):
        make(library, index)
    age(library, 30)
    for index in range(4):
        library.open(key(index))
    wait_for_uses(library, 4)
    stop = threading.Event()

    def collect_always() -> None:
        while not stop.is_set():
            collect(library, GcPolicy(max_age_s=DAY_S, max_bytes=0))

    collector = threading.Thread(target=collect_always)
    collector.start()
    try:
        for index in range(100, 130):
            make(library, index)
            assert set(read_all(library, key(index))) == {"plan", "first", "own"}
            assert set(read_all(library, key(index % 4))) == {"plan", "first", "own"}
    finally:
        stop.set()
        collector.join()
    assert library.open(key(7)).outcome is Outcome.ABSENT
    assert library.counters.refusals == {}


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    digests = [sha256(bytes([index])) for index in range(6)]
    times = st.floats(NOW_S - 20 * DAY_S, NOW_S)
    blobs = tuple(StoredObject(blob_name(digest), 10, draw(times)) for digest in digests)
    manifests, names = [], []
    for index in range(draw(st.integers(0, 6))):
        owner = f"{draw(st.integers(0, 3)):064}"
        name = f"{index + 100:064}"
        named = draw(st.none() | st.sets(st.sampled_from(digests)).map(lambda found: dict.fromkeys(found, 10)))
        older = [other for other_key, other in names if other_key == owner]
        supersedes = draw(st.sets(st.sampled_from(older))) if older else set()
        stored = StoredObject(f"bundles/{owner}/{name}", 100, draw(times))
        manifests.append(StoredManifest(stored, named, sorted(supersedes)))
        names.append((owner, name))
    keys = sorted({owner for owner, _ in names})
    return Inventory(
        blobs,
        tuple(manifests),
        {owner: draw(times) for owner in keys if draw(st.booleans())},
        frozenset(owner for owner in keys if draw(st.booleans())),
        frozenset(item.object.name for item in manifests if draw(st.integers(0, 4)) == 0),
    )


@given(inventories(), st.sampled_from([None, 0.0, 5 * DAY_S]), st.sampled_from([None, 0, 25]), st.floats(0, 5 * DAY_S))
def test_invariants(inventory: Inventory, max_age_s: float | None, max_bytes: int | None, grace_s: float) -> None:
    plan = plan_collection(inventory, GcPolicy(max_age_s, max_bytes, grace_s), NOW_S)
    gone = set(plan.names)
    objects = [*inventory.blobs, *(item.object for item in inventory.manifests)]
    assert all(NOW_S - item.modified_s > grace_s for item in objects if item.name in gone)
    assert not inventory.kept & set(plan.keys)
    for manifest in inventory.manifests:
        owner = manifest.object.name.split("/")[1]
        if manifest.object.name in gone:
            assert owner not in inventory.kept
            continue
        # A manifest that stays has all that it names.
        assert not {blob_name(digest) for digest in manifest.blobs or {}} & gone
    # Nothing goes after what it needs: manifests come before blobs.
    kinds = [name.partition("/")[0] for name in plan.names]
    assert kinds == sorted(kinds, key=["bundles", "blobs"].index)
