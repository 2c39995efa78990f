"""AOTInductor pieces: a fresh process runs them without importing a compiler.

Building them takes a C++ compiler about a minute, so they are kept between test runs, under a key that covers every
source that they depend on.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.compile_cases import assert_equals_eager, compile_decoder, tiny_decoder
from tests.tiny_models import tiny_checkpoint
from workers.artifacts.errors import RefusedError
from workers.artifacts.gc import GcPolicy, collect
from workers.artifacts.library import ArtifactLibrary
from workers.artifacts.names import blob_name
from workers.checkpoint.cache import cache_root
from workers.compile.key import bundle_key
from workers.compile.model import CompiledModel
from workers.compile.shared_library import CXX_RUNTIME, needed_libraries
from workers.config import ArtifactConfig, CompilationConfig

NAME = "qwen3"
CPU = torch.device("cpu")
KEY = bundle_key(CompilationConfig(), CPU, {"input_ids_T": 0, "positions_T": 0})

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

#: Loads the pieces and answers one prompt and one decode step, as a replica does.
WARM_PROCESS = """
import json, sys, time
import torch
from tests.paged import PagedSession
from workers.attention.selector import make_backend
from workers.artifacts.library import ArtifactLibrary
from workers.compile import compile_model
from workers.compile.counters import compiler_activity
from workers.config import ArtifactConfig, CompilationConfig
from workers.model.config import ModelConfig
from workers.model.loader import load_model
from pathlib import Path

checkpoint, folder = map(Path, sys.argv[1:])
cpu = torch.device("cpu")
with torch.inference_mode():
    model = load_model(checkpoint, ModelConfig.from_folder(checkpoint), torch.float32, cpu)
    example = {"input_ids_T": torch.arange(8), "positions_T": torch.arange(8)}
    config = CompilationConfig(mode="VLLM_COMPILE", piece_format="aoti")
    expected = PagedSession(model, make_backend("sdpa", model.attention_spec(8), cpu))
    compiled = compile_model(model, config, example, library=ArtifactLibrary.from_config(ArtifactConfig(), folder))
    forward = model.forward
    session = PagedSession(model, make_backend("sdpa", model.attention_spec(8), cpu))
    chunks = [{"a": [3, 1, 4, 1, 5], "b": [9]}, {"a": [2]}, {"a": [6], "b": [5], "c": [3, 5]}]
    for chunk in chunks:
        want = expected.step(chunk)
        model.forward = compiled
        got = session.step(chunk)
        model.forward = forward
        for key in chunk:
            torch.testing.assert_close(got[key], want[key], atol=1e-5, rtol=1e-5)
print(json.dumps({
    "is_warm": compiled.report.is_warm,
    "num_loaded": compiled.counters.num_loaded,
    "activity": compiler_activity(),
    "compilers": [name for name in ("torch._dynamo", "torch._inductor", "triton") if name in sys.modules],
}))
"""


@pytest.fixture(scope="module")
def folder() -> Path:
    return cache_root() / "test-artifacts"


@pytest.fixture(scope="module")
def library(folder: Path) -> ArtifactLibrary:
    return ArtifactLibrary.from_config(ArtifactConfig(), folder)


@pytest.fixture(scope="module")
def built(library: ArtifactLibrary) -> CompiledModel:
    """The pieces of one tiny model, in the store."""
    compiled = compile_decoder(tiny_decoder(NAME), library=library, mode="VLLM_COMPILE", piece_format="aoti")
    if not compiled.report.is_warm:
        # Pieces of earlier sources are of no use any more.
        collect(library, GcPolicy(max_bytes=0, grace_s=60))
    return compiled


def pieces(built: CompiledModel, library: ArtifactLibrary) -> dict[str, bytes]:
    """The packages by their digests."""
    assert built.plan is not None
    builds = [record.find_build("aoti", None) for record in built.plan.pieces.values()]
    digests = [build.sha256 for build in builds if build is not None]
    packages = {digest: library.store.get(blob_name(digest), 1 << 30) for digest in digests}
    assert len(packages) == 3
    return {digest: data for digest, data in packages.items() if data is not None}


def test_pieces_equal_eager(built: CompiledModel) -> None:
    assert built.report.piece_format == "aoti"
    for seed in range(2):
        assert_equals_eager(tiny_decoder(NAME), built, seed)


def test_a_fresh_process_needs_no_compiler(built: CompiledModel, folder: Path) -> None:
    command = [sys.executable, "-c", WARM_PROCESS, str(tiny_checkpoint(NAME)), str(folder)]
    root = Path(__file__).parents[2]
    # The number of threads is part of the key, and an earlier test may have changed this process'.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report == {
        "is_warm": True,
        "num_loaded": 3,
        "activity": {"dynamo_graphs": 0, "aot_graphs": 0, "inductor_graphs": 0},
        "compilers": [],
    }


def test_every_library_links_the_shared_cxx_runtime(built: CompiledModel, library: ArtifactLibrary) -> None:
    for data in pieces(built, library).values():
        with zipfile.ZipFile(io.BytesIO(data)) as package:
            libraries = [package.read(name) for name in package.namelist() if name.endswith(".so")]
        assert libraries
        assert all(CXX_RUNTIME in needed_libraries(binary) for binary in libraries)


def test_auto_takes_what_was_built(built: CompiledModel, library: ArtifactLibrary) -> None:
    compiled = compile_decoder(tiny_decoder(NAME), library=library, mode="VLLM_COMPILE")
    assert (compiled.report.piece_format, compiled.report.is_warm) == ("aoti", True)


def test_a_library_that_was_changed_is_not_opened(built: CompiledModel, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    copy = ArtifactLibrary.from_config(ArtifactConfig(), tmp_path / "copy")
    digest, package = next(iter(pieces(built, copy).items()))
    data = bytearray(package)
    data[len(data) // 2] ^= 1
    (tmp_path / "copy" / "store" / blob_name(digest)).write_bytes(data)
    bundle = copy.open(KEY).bundle
    assert bundle is not None
    entry = next(entry for entry in bundle.entries if entry.sha256 == digest)
    with pytest.raises(RefusedError, match="not those that were signed"):
        copy.read(bundle, entry)
