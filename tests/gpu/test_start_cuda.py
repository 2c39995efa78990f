"""A start on a CUDA device: the driver before torch, a warm start without a compiler, pieces that take over."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import tiny_checkpoint
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.leases.base import Lease
from workers.leases.memory import MemoryLeases
from workers.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_config(store: Path, piece_format: str = "standalone", **artifacts: Any) -> EngineConfig:
    return EngineConfig.create(
        model=str(tiny_checkpoint("llama")),
        dtype="float32",
        device="cuda",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=200,
        skip_tokenizer_init=True,
        attention_backend="sdpa",
        compilation_config={"mode": "VLLM_COMPILE", "piece_format": piece_format},
        artifacts={"store": str(store), **artifacts},
    )


def test_the_driver_comes_up_without_torch_and_torch_uses_its_context() -> None:
    code = """
import sys
from workers.startup.cuda import initialize_driver
assert initialize_driver(0) and "torch" not in sys.modules
import torch
assert torch.ones(3, device="cuda").sum().item() == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True)


_WARM = """
import json, sys
from workers.config import EngineConfig
from workers.engine.engine import Engine
report = Engine(EngineConfig.model_validate_json(sys.argv[1])).startup_report()
print(json.dumps({"hits": [row.is_hit for row in report.lookups], "names": [row.name for row in report.phases],
                  "compiler": "torch._inductor.compile_fx" in sys.modules, "sympy": "sympy" in sys.modules}))
"""


def test_a_warm_start_imports_no_compiler(tmp_path: Path) -> None:
    # Made here: making a checkpoint imports transformers, and with it sympy.
    config = make_config(tmp_path, "aoti").model_dump_json()
    for is_warm in (False, True):
        run = subprocess.run([sys.executable, "-c", _WARM, config], capture_output=True, text=True, check=True)
        seen = json.loads(run.stdout.splitlines()[-1])
        assert seen["hits"] == [is_warm]
        assert seen["compiler"] is seen["sympy"] is not is_warm
        assert {"device", "artifacts", "attention kernels", "linear kernels"} <= set(seen["names"])


def test_pieces_that_arrive_take_over_from_the_eager_model_under_way(tmp_path: Path) -> None:
    leases = MemoryLeases(ttl_s=600)  # the other replica sends no heartbeats here
    reference = Engine(make_config(tmp_path / "first"))
    other = leases.acquire(reference.runner.bundle_key.digest, "another replica")
    assert isinstance(other, Lease)
    engine = Engine(make_config(tmp_path / "second", serve_meanwhile=True), leases=leases)
    assert not engine.runner.artifact_warm
    engine.add_request("r", [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
    tokens = [token for _ in range(8) for chunk in engine.step() for token in chunk.token_ids]
    leases.release(other)
    deadline = time.monotonic() + 300
    while not engine.runner._serving._has_arrived():
        assert time.monotonic() < deadline
        assert engine.runner._serving.is_temporary, "it took over while another replica was building, or failed"
        time.sleep(0.05)
    while engine.has_unfinished:
        tokens += [token for chunk in engine.step() for token in chunk.token_ids]
    assert len(tokens) == 400, "no token was lost or made twice"
    assert engine.startup_report().swapped_s is not None
    assert engine.runner._graphs.compiled.plan is not None
    while engine.use_idle_time():
        pass
    assert sum(engine.graph_report().captured.values()) > 0, "graphs of the compiled model are captured in gaps"


def test_an_idle_engine_builds_what_the_next_start_loads_without_a_compiler(tmp_path: Path) -> None:
    options: dict[str, Any] = {"build_in_background": True}
    engine = Engine(make_config(tmp_path, "auto", **options))
    assert engine.runner._graphs.compiled.plan is not None
    while engine.use_idle_time():
        pass
    background = engine.runner._background
    assert background is not None
    background.wait()
    again = Engine(make_config(tmp_path, "auto"))
    assert again.runner.artifact_warm
    assert again.runner._graphs.compiled.report.piece_format == "aoti"
    tokens = []
    for one in (engine, again):
        one.add_request("r", [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
        tokens.append([token for _ in range(22) for chunk in one.step() for token in chunk.token_ids])
    assert len(tokens[0]) == 20
    assert tokens[0] == tokens[1]
