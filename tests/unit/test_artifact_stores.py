"""Every store keeps the same contract, and trouble has one name."""

from __future__ import annotations

import multiprocessing
import os
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.artifact_cases import UnreliableStore, s3_server
from workers.artifacts.digest import sha256
from workers.artifacts.errors import Refusal, RefusedError, StoreError
from workers.artifacts.names import blob_name
from workers.artifacts.stores.base import ArtifactStore
from workers.artifacts.stores.directory import DirectoryStore
from workers.artifacts.stores.factory import COPIED, is_intact, open_store
from workers.artifacts.stores.guarded import GuardedStore
from workers.artifacts.stores.memory import MemoryStore
from workers.artifacts.stores.object_store import ObjectStore
from workers.artifacts.stores.tiered import TieredStore
from workers.config import ArtifactConfig
from workers.errors import ConfigError

DATA = b"machine code"
NAME = blob_name(sha256(DATA))


@pytest.fixture(scope="module")
def s3_options() -> Iterator[dict[str, str]]:
    with s3_server() as options:
        yield options


@pytest.fixture(params=["memory", "directory", "s3", "tiered", "guarded"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "directory":
        return DirectoryStore(tmp_path / "store")
    if request.param == "s3":
        options = request.getfixturevalue("s3_options")
        return ObjectStore(f"s3://artifacts/{tmp_path.name}", options)
    if request.param == "tiered":
        return TieredStore(DirectoryStore(tmp_path / "tier"), MemoryStore(), COPIED, is_intact)
    if request.param == "guarded":
        return GuardedStore(MemoryStore(), 5)
    return MemoryStore()


def test_the_contract(store: ArtifactStore) -> None:
    assert store.get(NAME, 100) is None
    assert store.list("blobs/") == []
    before_s = time.time() - 5
    assert store.put_if_absent(NAME, DATA)
    assert not store.put_if_absent(NAME, b"others")
    assert store.get(NAME, len(DATA)) == DATA
    assert store.put_if_absent("uses/key/2026-11-25", b"")
    assert store.get("uses/key/2026-11-25", 0) == b""
    (item,) = store.list("blobs/")
    assert (item.name, item.num_bytes) == (NAME, len(DATA))
    assert before_s < item.modified_s < time.time() + 5
    assert [item.name for item in store.list("")] == sorted([NAME, "uses/key/2026-11-25"])
    store.delete(NAME)
    store.delete(NAME)
    assert store.get(NAME, 100) is None
    assert store.list("blobs/") == []


def test_no_more_is_read_than_allowed(store: ArtifactStore) -> None:
    store.put_if_absent(NAME, DATA)
    with pytest.raises(RefusedError) as error:
        store.get(NAME, len(DATA) - 1)
    assert error.value.reason is Refusal.TOO_LARGE


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "blobs/../../outside", "blobs//x", "blobs/.hidden", "a\\b", "", "a\nb", "a/"]
)
def test_names_cannot_lead_outside(store: ArtifactStore, name: str) -> None:
    for call in (lambda: store.get(name, 1), lambda: store.put_if_absent(name, b""), lambda: store.delete(name)):
        with pytest.raises(RefusedError, match="is no name of an artifact"):
            call()


def test_of_writers_at_once_one_wins(store: ArtifactStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda index: store.put_if_absent("leases/one", b"%d" % index), range(8)))
    assert won.count(True) == 1
    assert store.get("leases/one", 1) == b"%d" % won.index(True)


def _put_in_process(folder: str, index: int, results: multiprocessing.Queue[bool]) -> None:
    results.put(DirectoryStore(Path(folder)).put_if_absent("leases/one", b"%d" % index))


def test_of_processes_at_once_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[bool] = context.Queue()
    processes = [context.Process(target=_put_in_process, args=(str(tmp_path), n, results)) for n in range(6)]
    for process in processes:
        process.start()
    assert sorted(results.get() for _ in processes) == [False] * 5 + [True]
    for process in processes:
        process.join()
    assert [path.name for path in (tmp_path / "leases").iterdir()] == ["one"]


def test_a_directory_is_private_and_left_clean(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.put_if_absent(NAME, DATA)
    for folder in (store.root, store.root / "blobs"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.root / NAME).stat().st_mode) == 0o600
    assert [path.name for path in (store.root / NAME).parent.iterdir()] == [sha256(DATA)]


def test_what_lies_in_a_shared_directory_is_shared(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    DirectoryStore(tmp_path).put_if_absent(NAME, DATA)
    assert stat.S_IMODE((tmp_path / NAME).parent.stat().st_mode) == 0o770
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o660


def test_what_a_dead_writer_left_is_removed_in_time(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put_if_absent("blobs/aa/x", DATA)
    scratch = tmp_path / "blobs" / "aa" / ".new-0123"
    scratch.write_bytes(b"half")
    assert [item.name for item in store.list("")] == ["blobs/aa/x"]
    assert scratch.exists()
    os.utime(scratch, (1, 1))
    store.list("")
    assert not scratch.exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(DATA)
    store = DirectoryStore(tmp_path / "store")
    store.put_if_absent("blobs/aa/x", DATA)
    (store.root / "blobs" / "aa" / "link").symlink_to(tmp_path / "secret")
    (store.root / "blobs" / "bb").symlink_to(tmp_path)
    for name in ("blobs/aa/link", "blobs/bb/secret"):
        with pytest.raises(RefusedError, match="symbolic link"):
            store.get(name, 100)
    with pytest.raises(RefusedError, match="symbolic link"):
        store.put_if_absent("blobs/bb/new", b"")
    assert [item.name for item in store.list("")] == ["blobs/aa/x"]


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    (tmp_path / "blobs").mkdir()
    os.mkfifo(tmp_path / "blobs" / "fifo")
    with pytest.raises(RefusedError, match="no regular file"):
        store.get("blobs/fifo", 100)


def test_a_full_disk_and_a_read_only_one_are_store_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(tmp_path / "store")

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            store.put_if_absent(NAME, DATA)
    assert store.get(NAME, 100) is None
    assert store.list("") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="File exists"):
        DirectoryStore(tmp_path / "file").put_if_absent(NAME, DATA)


def test_without_hard_links_a_rename_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    store = DirectoryStore(tmp_path)
    assert store.put_if_absent(NAME, DATA)
    assert not store.put_if_absent(NAME, DATA)
    assert [item.name for item in store.list("")] == [NAME]


def test_an_endpoint_that_is_not_there_is_a_store_error() -> None:
    store = ObjectStore("s3://artifacts/x", {"endpoint": "http://127.0.0.1:9", "region": "us-east-1"}, timeout_s=1)
    for call in (lambda: store.list(""), lambda: store.get(NAME, 1), lambda: store.put_if_absent(NAME, DATA)):
        with pytest.raises(StoreError, match=r"^s3://artifacts/x: "):
            call()


def test_a_bucket_that_is_not_there_is_a_store_error(s3_options: dict[str, str]) -> None:
    with pytest.raises(StoreError):
        ObjectStore("s3://no-such-bucket/x", s3_options, timeout_s=1).put_if_absent(NAME, DATA)


class _CountingStore(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.num_gets = 0

    def get(self, name: str, max_bytes: int) -> bytes | None:
        self.num_gets += 1
        time.sleep(0.05)
        return super().get(name, max_bytes)


def test_a_node_downloads_once(tmp_path: Path) -> None:
    remote = _CountingStore()
    remote.put_if_absent(NAME, DATA)
    stores = [TieredStore(DirectoryStore(tmp_path), remote, COPIED, is_intact) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda store: store.get(NAME, 100), stores)) == [DATA] * 6
    assert remote.num_gets == 1


def test_a_damaged_copy_is_fetched_again(tmp_path: Path) -> None:
    remote = MemoryStore()
    store = TieredStore(DirectoryStore(tmp_path), remote, COPIED, is_intact)
    store.put_if_absent(NAME, DATA)
    (tmp_path / NAME).write_bytes(b"other bytes.")
    assert store.get(NAME, 100) == DATA
    assert (tmp_path / NAME).read_bytes() == DATA


def test_a_warm_node_stays_warm_without_the_remote_store(tmp_path: Path) -> None:
    remote = UnreliableStore()
    store = TieredStore(DirectoryStore(tmp_path), remote, COPIED, is_intact)
    store.put_if_absent(NAME, DATA)
    remote.reading = StoreError("gone")
    assert store.get(NAME, 100) == DATA
    assert [item.name for item in store.list("blobs/")] == [NAME]
    with pytest.raises(StoreError):
        store.list("bundles/")


def test_the_local_tier_keeps_what_was_used_last(tmp_path: Path) -> None:
    remote = MemoryStore()
    store = TieredStore(DirectoryStore(tmp_path), remote, COPIED, is_intact, max_local_bytes=25)
    blobs = [bytes([65 + index]) * 10 for index in range(3)]
    names = [blob_name(sha256(blob)) for blob in blobs]
    for index, name in enumerate(names[:2]):
        store.put_if_absent(name, blobs[index])
        os.utime(tmp_path / name, (1000 + index, 1000 + index))
    store.get(names[0], 10)
    store.put_if_absent(names[2], blobs[2])
    assert {item.name for item in DirectoryStore(tmp_path).list("blobs/")} == {names[0], names[2]}
    assert store.get(names[1], 10) == blobs[1]


def test_a_store_that_fails_is_left_alone_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    inner, failures = UnreliableStore(), []
    store = GuardedStore(inner, 5, rest_s=0.2, on_failure=failures.append)
    inner.writing = StoreError("full")
    for _ in range(3):
        with pytest.raises(StoreError, match="full"):
            store.put_if_absent(NAME, DATA)
    assert (inner.num_calls, failures) == (1, ["writing"])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert store.get(NAME, 1) is None  # it can still be read
    inner.writing = None
    time.sleep(0.25)
    assert store.put_if_absent(NAME, DATA)


def test_a_store_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, released = MemoryStore(), threading.Event()
    monkeypatch.setattr(inner, "list", lambda prefix: released.wait(30))
    store = GuardedStore(inner, 0.1)
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(StoreError, match=r"no answer within 0\.1 s"):
            store.list("")
    assert time.monotonic() - started < 5
    released.set()


def test_configs_name_stores(tmp_path: Path) -> None:
    assert open_store(ArtifactConfig(), tmp_path).url == str(tmp_path / "store")
    assert open_store(ArtifactConfig(store="/mnt/shared"), tmp_path).url == "/mnt/shared"
    assert open_store(ArtifactConfig(store="s3://bucket/x"), tmp_path).url.startswith("s3://bucket/x (in front of it ")
    assert open_store(ArtifactConfig(store="gs://bucket", local_tier=False), tmp_path).url == "gs://bucket"
    with pytest.raises(ConfigError, match="neither a path nor a URL"):
        open_store(ArtifactConfig(store="ftp://host/x"), tmp_path)
    with pytest.raises(ConfigError, match=r"^artifacts\.store: "):
        open_store(ArtifactConfig(store="s3://bucket", store_options={"endpiont": "x"}), tmp_path)
