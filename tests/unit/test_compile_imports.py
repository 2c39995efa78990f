"""Bookkeeping of the compile layer costs no import of torch, let alone of a compiler."""

from __future__ import annotations

import subprocess
import sys


def test_plans_and_stores_need_no_torch() -> None:
    code = """
import sys
import workers.compile
from workers.compile import CompilationMode, Plan
import workers.artifacts.library
import workers.compile.shared_library
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_decorator_needs_no_compiler() -> None:
    code = """
import sys
from workers.compile import support_torch_compile
import workers.compile.model, workers.compile.stitch, workers.compile.formats.aoti
compilers = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
assert not compilers, compilers
"""
    subprocess.run([sys.executable, "-c", code], check=True)
