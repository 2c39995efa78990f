"""A node that never compiled a Triton kernel compiles none, and needs no C compiler: all comes with the bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_checkpoint

pytestmark = pytest.mark.gpu

ENGINE = """
import json, sys
from workers import LLM, SamplingParams
from workers.runner.triton_kernels import TritonKernels

restores = []
restore = TritonKernels.restore
TritonKernels.restore = lambda self: restores.append(restore(self))
checkpoint, store = sys.argv[1:]
llm = LLM(checkpoint, device="cuda", dtype="bfloat16", max_model_len=128, max_num_seqs=4, skip_tokenizer_init=True,
          compilation_config={"mode": "VLLM_COMPILE", "piece_format": "standalone"}, artifacts={"store": store})
prompts = [{"prompt_token_ids": [3, 1, 4, 1, 5]}, {"prompt_token_ids": [9, 2]}]
outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), use_tqdm=False)
while llm.engine.use_idle_time():
    pass
llm.engine.runner.wait_shared()
(restored,) = restores
print(json.dumps({
    "restored": restored,
    "compiled": len(llm.engine.runner._triton_kernels._compiled()) - restored,
    "is_warm": llm.engine.stats().artifact_warm,
    "tokens": [output.outputs[0].token_ids for output in outputs],
}))
"""


def run(node: Path, store: Path, **variables: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    environment |= {"WARMGRAPH_ARTIFACTS": str(node), "TORCHINDUCTOR_CACHE_DIR": str(node / "inductor")}
    environment |= variables
    # One key for both nodes, as a fleet has.
    command = [sys.executable, "-c", ENGINE, str(tiny_checkpoint("llama")), str(store)]
    root = Path(__file__).parents[2]
    process = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert process.returncode == 0, process.stderr
    report: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return report


def test_a_new_node_compiles_no_kernel(tmp_path: Path) -> None:
    cold = run(tmp_path / "one", tmp_path / "store")
    assert cold["compiled"] > 0
    (tmp_path / "two" / "keys").mkdir(parents=True, mode=0o700)
    key = (tmp_path / "one" / "keys" / "local.pem").read_bytes()
    (tmp_path / "two" / "keys" / "local.pem").touch(mode=0o600)
    (tmp_path / "two" / "keys" / "local.pem").write_bytes(key)
    warm = run(tmp_path / "two", tmp_path / "store", CC="/bin/false")
    assert warm["is_warm"]
    assert (cold["restored"], warm["restored"]) == (0, cold["compiled"])
    assert warm["compiled"] == 0
    assert warm["tokens"] == cold["tokens"]
