"""Triton's files travel between nodes whole, under each node's own path, and only what was verified is unpacked."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import pytest

from tests.artifact_cases import KEY, PLAN, make_library
from workers.artifacts.archives import pack
from workers.artifacts.library import Addition, ArtifactLibrary
from workers.artifacts.manifest import Kind
from workers.artifacts.names import blob_name
from workers.artifacts.signing import SignerKey
from workers.runner.triton_kernels import NAME, TritonKernels

SIGNER = SignerKey.generate()


@pytest.fixture(autouse=True)
def _variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")


@pytest.fixture
def library() -> ArtifactLibrary:
    library = make_library(signer=SIGNER)
    library.publish(KEY, [PLAN])
    return library


def node(library: ArtifactLibrary, root: Path) -> TritonKernels:
    """An engine's start on a node of its own."""
    os.environ.pop("TRITON_CACHE_DIR", None)
    kernels = TritonKernels(library, KEY, root)
    kernels.restore()
    return kernels


def compile_kernel(folder: Path, name: str, *, is_complete: bool = True) -> None:
    """What Triton leaves behind."""
    target = folder / name
    target.mkdir()
    (target / "decode.cubin").write_bytes(b"\x7fELF" + name.encode())
    children = {"decode.cubin": str(target / "decode.cubin")}
    if is_complete:
        (target / "__grp__decode.json").write_text(json.dumps({"child_paths": children}))


def test_a_new_node_gets_what_another_compiled(library: ArtifactLibrary, tmp_path: Path) -> None:
    first = node(library, tmp_path / "one")
    assert os.environ["TRITON_CACHE_DIR"] == str(first.folder)
    compile_kernel(first.folder, "HASH1")
    compile_kernel(first.folder, "HASH2", is_complete=False)
    thread = first.publish_new()
    assert thread is not None
    thread.join()
    assert first.publish_new() is None
    second = node(library, tmp_path / "two")
    (folder,) = second.folder.iterdir()
    assert (folder / "decode.cubin").read_bytes() == b"\x7fELFHASH1"
    group = json.loads((folder / "__grp__decode.json").read_text())
    assert group == {"child_paths": {"decode.cubin": str(folder / "decode.cubin")}}
    assert second.publish_new() is None
    compile_kernel(second.folder, "HASH3")
    assert second.publish()
    os.environ.pop("TRITON_CACHE_DIR")
    assert first.restore() == 1
    assert {path.name for path in first.folder.iterdir()} == {"HASH1", "HASH2", "HASH3"}


def test_modules_that_launch_kernels_travel_too(library: ArtifactLibrary, tmp_path: Path) -> None:
    first = node(library, tmp_path / "one")
    (first.folder / "HASH1").mkdir()
    module = f"HASH1/cuda_utils{sysconfig.get_config_var('EXT_SUFFIX')}"
    (first.folder / module).write_bytes(b"\x7fELF")
    assert first.publish()
    assert (node(library, tmp_path / "two").folder / module).read_bytes() == b"\x7fELF"


def test_what_an_earlier_process_of_the_node_compiled_is_published_too(
    library: ArtifactLibrary, tmp_path: Path
) -> None:
    compile_kernel(node(library, tmp_path / "one").folder, "HASH1")  # ended before it was idle
    later = node(library, tmp_path / "one")
    assert later.publish_new() is not None
    later.wait_published()
    assert [path.name for path in node(library, tmp_path / "two").folder.iterdir()] == ["HASH1"]


def test_equal_kernels_are_equal_bytes_on_every_node(library: ArtifactLibrary, tmp_path: Path) -> None:
    for name in ("one", "two"):
        kernels = node(library, tmp_path / name)
        if name == "one":
            compile_kernel(kernels.folder, "HASH1")
        kernels.publish()
    assert len(library.store.list("blobs/")) == 2  # the plan, and one archive


def test_a_folder_of_the_operators_is_left_alone(library: ArtifactLibrary, tmp_path: Path) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path / "theirs")
    kernels = TritonKernels(library, KEY, tmp_path / "root")
    assert kernels.restore() == 0
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "theirs")
    assert kernels.publish_new() is None
    assert not (tmp_path / "root").exists()


def test_a_damaged_archive_is_not_unpacked(library: ArtifactLibrary, tmp_path: Path) -> None:
    bundle = library.publish(KEY, [Addition(Kind.TRITON, NAME, pack({"HASH/k.cubin": b"x"}))], library.peek(KEY))
    assert bundle is not None
    entry = bundle.first(Kind.TRITON)
    assert entry is not None
    library.store.delete(blob_name(entry.sha256))
    library.store.put_if_absent(blob_name(entry.sha256), b"y" * entry.num_bytes)
    kernels = node(library, tmp_path / "node")
    assert list(kernels.folder.iterdir()) == []


def test_an_archive_that_climbs_out_is_not_unpacked(library: ArtifactLibrary, tmp_path: Path) -> None:
    for name in ("../../outside", "/tmp/outside", "HASH/../../../outside"):
        library.publish(KEY, [Addition(Kind.TRITON, NAME, pack({name: b"x"}))], library.peek(KEY))
        kernels = node(library, tmp_path / "node")
        assert list(kernels.folder.iterdir()) == []
    assert not list(tmp_path.rglob("outside"))


def test_a_folder_that_cannot_be_made_is_no_reason_to_fail(library: ArtifactLibrary) -> None:
    kernels = node(library, Path("/proc/warmgraph"))
    assert "TRITON_CACHE_DIR" not in os.environ
    assert kernels.publish_new() is None


def test_without_a_bundle_nothing_is_published(tmp_path: Path) -> None:
    library = make_library(signer=SIGNER)
    kernels = node(library, tmp_path)
    compile_kernel(kernels.folder, "HASH1")
    assert not kernels.publish()
    assert library.store.list("") == []
