"""A stored plan is enough to build another format, in a process that disturbs nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.compile_cases import MIXING_OPS, MixingModel, compile_mixing, mixing_inputs
from workers.artifacts.library import ArtifactLibrary
from workers.compile.background import BackgroundBuild
from workers.compile.build_more import build_more
from workers.compile.errors import BuildFailedError, PlanMismatchError
from workers.compile.key import bundle_key
from workers.compile.piece_set import PieceSet, additions, read_plan
from workers.compile.plan import InputSpec
from workers.compile.specialize import TYPICAL_SIZE, example_inputs
from workers.config import CompilationConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


ROOT = Path(__file__).parents[2]
CONFIG = CompilationConfig(mode="VLLM_COMPILE")
KEY = bundle_key(CONFIG, torch.device("cpu"), {"x_TE": 0}, splitting_ops=MIXING_OPS)


@pytest.fixture
def library() -> ArtifactLibrary:
    return ArtifactLibrary.in_memory()


@pytest.fixture
def pieces(library: ArtifactLibrary) -> PieceSet:
    """Of a model that was compiled as it stands, for every size and for one, as its replica finds them."""
    compile_mixing(MixingModel(3), library=library, compile_sizes=[4])
    return stored(library)


def stored(library: ArtifactLibrary) -> PieceSet:
    bundle = library.open(KEY).bundle
    assert bundle is not None
    return PieceSet(read_plan(library, bundle), "fx", library, bundle)


def test_another_format_is_built_beside_the_serving_process(pieces: PieceSet, library: ArtifactLibrary) -> None:
    build = BackgroundBuild(pieces, "standalone")
    assert build.poll() is None
    deadline = time.monotonic() + 60
    while psutil.Process(build.pid).nice() != 19:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    built = build.wait(240)
    assert built.plan.formats() == built.plan.formats(4) == ["fx", "standalone"]
    # What a replica does with it: publish, and load at its next start.
    library.publish(KEY, additions(built.plan, built.blobs, built.probes), built.bundle)
    model = MixingModel(3)
    warm = compile_mixing(model, library=library, compile_sizes=[4], piece_format="standalone")
    assert (warm.report.is_warm, warm.counters.num_traces, warm.counters.num_compiled) == (True, 0, 0)
    for num_tokens in (1, 4, 7):
        x_TE = mixing_inputs(num_tokens)
        torch.testing.assert_close(warm(x_TE), model(x_TE), atol=1e-5, rtol=1e-5)


def test_a_build_that_fails_says_why(pieces: PieceSet) -> None:
    pieces.plan.factors["environment"]["torch"] = "1.0"
    build = BackgroundBuild(pieces, "fx", sizes=[8])
    with pytest.raises(BuildFailedError, match=r"The plan was made for torch 1\.0; here it is"):
        build.wait(120)


def test_a_build_can_be_stopped(pieces: PieceSet) -> None:
    build = BackgroundBuild(pieces, "standalone")
    child = psutil.Process(build.pid)
    build.stop()
    assert not child.is_running()


def test_a_build_ends_with_whoever_started_it() -> None:
    code = """
import time
from tests.engine.test_compile_background import MixingModel, compile_mixing, stored
from workers.artifacts.library import ArtifactLibrary
from workers.compile.background import BackgroundBuild
library = ArtifactLibrary.in_memory()
compile_mixing(MixingModel(1), library=library)
print(BackgroundBuild(stored(library), "standalone").pid, flush=True)
time.sleep(60)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert starter.stdout is not None
    child = psutil.Process(int(starter.stdout.readline()))
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    child.wait(20)


def test_only_what_is_missing_is_built(pieces: PieceSet) -> None:
    assert not build_more(pieces.plan, pieces.sources(), "fx", [None, 4])
    blobs = build_more(pieces.plan, pieces.sources(), "fx", [None, 4, 8])
    assert len(blobs) == 3
    assert pieces.plan.sizes() == [None, 4, 8]


def test_inputs_come_from_their_specs() -> None:
    spec = InputSpec("bfloat16", "cpu", ("n0", 3), (6, 1))
    (fixed,) = example_inputs([spec], 5)
    assert (fixed.dtype, tuple(fixed.shape), fixed.stride()) == (torch.bfloat16, (5, 3), (6, 1))
    (doubled,) = example_inputs([InputSpec("float32", "cpu", ("2*n0", 4), (4, 1))], 5)
    assert tuple(doubled.shape) == (10, 4)
    (symbolic,) = example_inputs([spec], None)
    size = symbolic.shape[0]
    assert isinstance(size, torch.SymInt)
    assert size.node.hint == TYPICAL_SIZE


@pytest.mark.parametrize("size", ["__import__('os')", "n0.real", "", "8"])
def test_a_size_is_arithmetic_and_nothing_else(size: str) -> None:
    with pytest.raises(PlanMismatchError, match="is not a size"):
        example_inputs([InputSpec("float32", "cpu", (size,), (1,))], 5)


def test_the_child_knows_every_operator_that_a_piece_can_call() -> None:
    code = """
import json, sys
import importlib
importlib.import_module(sys.argv[1])
import torch
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("warmgraph::")]
print(json.dumps(sorted(name for name in names if "attention" not in name)))
"""

    def operators(module: str) -> list[str]:
        run = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=True)
        names: list[str] = json.loads(run.stdout)
        return names

    # Attention stands between pieces.
    assert operators("workers.compile.build_more") == operators("workers.engine.engine") != []
