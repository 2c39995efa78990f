"""The compiler can be imported beside other work, and only once."""

from __future__ import annotations

import subprocess
import sys


def test_the_import_runs_beside_other_work() -> None:
    code = """
import sys, threading
import torch
from workers.compile.prefetch import prefetch_compiler, wait_for_compiler
prefetch_compiler()
prefetch_compiler()
assert [thread.name for thread in threading.enumerate()].count("prefetch-compiler") == 1
weights = [torch.nn.Linear(64, 64) for _ in range(50)]
wait_for_compiler()
assert "torch._inductor.compile_fx" in sys.modules
compiled = torch.compile(weights[0], backend="eager")
assert compiled(torch.ones(2, 64)).shape == (2, 64)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
