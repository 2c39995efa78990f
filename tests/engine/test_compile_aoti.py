"""AOTInductor pieces: a fresh process runs them without importing a compiler.

Building them takes a C++ compiler about a minute, so they are kept between test runs, under a key that covers every
source that they depend on.
"""

from __future__ import annotations

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
from workers.checkpoint.cache import cache_root
from workers.compile.errors import DamagedPieceError
from workers.compile.model import CompiledModel
from workers.compile.shared_library import CXX_RUNTIME, needed_libraries
from workers.compile.store import LocalPieceStore

NAME = "qwen3"

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
from workers.compile import LocalPieceStore, compile_model
from workers.compile.counters import compiler_activity
from workers.config import CompilationConfig
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
    compiled = compile_model(model, config, example, store=LocalPieceStore(folder))
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
def store() -> LocalPieceStore:
    return LocalPieceStore(cache_root() / "test-pieces")


@pytest.fixture(scope="module")
def built(store: LocalPieceStore) -> CompiledModel:
    """The pieces of one tiny model, in the store."""
    compiled = compile_decoder(tiny_decoder(NAME), store=store, mode="VLLM_COMPILE", piece_format="aoti")
    if not compiled.report.is_warm:
        # Pieces of earlier sources are of no use any more.
        assert compiled.plan is not None
        keep = {build.sha256 for piece in compiled.plan.pieces.values() for build in piece.builds}
        for path in store.folder.iterdir():
            if path.name not in keep and path.suffix != ".json":
                path.unlink()
    return compiled


def test_pieces_equal_eager(built: CompiledModel) -> None:
    assert built.report.piece_format == "aoti"
    for seed in range(2):
        assert_equals_eager(tiny_decoder(NAME), built, seed)


def test_a_fresh_process_needs_no_compiler(built: CompiledModel, store: LocalPieceStore) -> None:
    command = [sys.executable, "-c", WARM_PROCESS, str(tiny_checkpoint(NAME)), str(store.folder)]
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


def test_every_library_links_the_shared_cxx_runtime(built: CompiledModel, store: LocalPieceStore) -> None:
    assert built.plan is not None
    for record in built.plan.pieces.values():
        build = record.find_build("aoti", None)
        assert build is not None
        with zipfile.ZipFile(store.folder / build.sha256) as package:
            libraries = [package.read(name) for name in package.namelist() if name.endswith(".so")]
        assert libraries
        assert all(CXX_RUNTIME in needed_libraries(library) for library in libraries)


def test_auto_takes_what_was_built(built: CompiledModel, store: LocalPieceStore) -> None:
    compiled = compile_decoder(tiny_decoder(NAME), store=store, mode="VLLM_COMPILE")
    assert (compiled.report.piece_format, compiled.report.is_warm) == ("aoti", True)


def test_a_library_that_was_changed_is_not_opened(built: CompiledModel, store: LocalPieceStore, tmp_path: Path) -> None:
    shutil.copytree(store.folder, tmp_path / "copy")
    copy = LocalPieceStore(tmp_path / "copy")
    assert built.plan is not None
    build = next(iter(built.plan.pieces.values())).find_build("aoti", None)
    assert build is not None
    data = bytearray((copy.folder / build.sha256).read_bytes())
    data[len(data) // 2] ^= 1
    copy.put(build.sha256, bytes(data))
    with pytest.raises(DamagedPieceError):
        compile_decoder(tiny_decoder(NAME), store=copy, mode="VLLM_COMPILE", piece_format="aoti")
