"""Stores keep bytes by name, and nothing that was changed gets past the digest."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from workers.compile.errors import CompileError, DamagedPieceError
from workers.compile.store import LocalPieceStore, MemoryPieceStore, PieceStore, digest, get_blob, put_blob


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PieceStore:
    return LocalPieceStore(tmp_path / "pieces") if request.param == "local" else MemoryPieceStore()


def test_what_was_put_comes_back(store: PieceStore) -> None:
    assert store.get("plan.json") is None
    store.put("plan.json", b"one")
    store.put("plan.json", b"two")
    assert store.get("plan.json") == b"two"


def test_a_blob_is_called_by_its_digest(store: PieceStore) -> None:
    name = put_blob(store, b"machine code")
    assert name == digest(b"machine code")
    assert get_blob(store, name) == b"machine code"


def test_a_changed_blob_is_refused(store: PieceStore) -> None:
    name = put_blob(store, b"machine code")
    store.put(name, b"Machine code")
    with pytest.raises(DamagedPieceError, match="damaged; it was not loaded"):
        get_blob(store, name)


def test_a_missing_blob_is_refused(store: PieceStore) -> None:
    with pytest.raises(DamagedPieceError, match="not in the store"):
        get_blob(store, digest(b"never put"))


def test_a_folder_is_private_and_left_clean(tmp_path: Path) -> None:
    local = LocalPieceStore(tmp_path / "pieces")
    put_blob(local, b"code")
    assert stat.S_IMODE(local.folder.stat().st_mode) == 0o700
    assert [path.name for path in local.folder.iterdir()] == [digest(b"code")]


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(CompileError, match="writable by nobody else"):
        LocalPieceStore(tmp_path)
