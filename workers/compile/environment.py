"""What compiled code depends on besides the model: machine, versions, sources, switches of the compilers.

Everything is listed on purpose; what is not here is not part of a key. No paths, host names or times. Imports no
compiler.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from workers.kernels import cpu_ops

#: Raise it when compiled code changes in a way that no other factor shows.
FORMAT_VERSION = 2

#: Packages whose sources can be in a traced graph or decide what it looks like.
_TRACED_PACKAGES = ("workers/model", "workers/kernels", "workers/compile", "workers/attention/op.py")

#: Switches of the compilers, by the beginning of their names: a new one counts until it is known not to matter.
_COMPILER_PREFIXES = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE_", "TRITON_")

#: Names the program that turns Triton's PTX into machine code.
_ASSEMBLER = "TRITON_PTXAS_PATH"

#: Names of instruction sets in /proc/cpuinfo, on x86 and on Arm; the other flags there say nothing of generated code.
_INSTRUCTION_SET = re.compile(
    r"(sse|ssse|avx|amx|fma|bmi|f16c|gfni|vaes|vpclmul|sha|adx|movbe|popcnt|abm|asimd|sve|sme(?!p)|bf16|i8mm|atomics|fphp)"
)

#: Switches that say where things lie, how fast they are made, or what is printed; none of them changes the code.
NEUTRAL_VARIABLES = frozenset(
    {
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCHINDUCTOR_COMPILE_THREADS",
        "TORCHINDUCTOR_COMPILE_WORKER_WAIT_TIMEOUT",
        "TORCHINDUCTOR_FILE_LOCK_TIMEOUT",
        "TORCHINDUCTOR_FX_GRAPH_CACHE",
        "TORCHINDUCTOR_FX_GRAPH_CACHE_DEFAULT",
        "TORCHINDUCTOR_AUTOGRAD_CACHE",
        "TORCHINDUCTOR_FX_GRAPH_REMOTE_CACHE",
        "TORCHINDUCTOR_AUTOGRAD_REMOTE_CACHE",
        "TORCHINDUCTOR_AUTOTUNE_REMOTE_CACHE",
        "TORCHINDUCTOR_BUNDLED_AUTOTUNE_REMOTE_CACHE",
        "TORCHINDUCTOR_NON_BLOCKING_REMOTE_CACHE_WRITE",
        "TORCHINDUCTOR_QUIESCE_ASYNC_COMPILE_POOL",
        "TORCHINDUCTOR_REDIS_HOST",
        "TORCHINDUCTOR_REDIS_PORT",
        "TORCHINDUCTOR_REDIS_URL",
        "TORCHINDUCTOR_WORKER_LOGPATH",
        "TORCHINDUCTOR_WORKER_START",
        "TORCHINDUCTOR_WORKER_SUPPRESS_LOGGING",
        "TORCHDYNAMO_VERBOSE",
        "TORCH_COMPILE_DEBUG",
        "TORCH_COMPILE_DEBUG_DIR",
        "TORCH_COMPILE_CPROFILE",
        "TORCH_COMPILE_DYNAMO_PROFILER",
        "TRITON_ALWAYS_COMPILE",
        "TRITON_CACHE_DIR",
        "TRITON_DUMP_DIR",
        "TRITON_HOME",
        "TRITON_KERNEL_DUMP",
        "TRITON_PRINT_AUTOTUNING",
    }
)


def environment_factors(device: torch.device, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The factors that every plan and piece on this machine has in common, by name.

    Args:
        environ: Environment variables, if not this process' own.
    """
    factors: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__,
        "torch_git": torch.version.git_version,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "variables": compiler_variables(os.environ if environ is None else environ),
    }
    return factors | (_cuda_factors(device) if device.type == "cuda" else _cpu_factors())


def compiler_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment's switches of the compilers that can change what is compiled, by name."""
    variables = {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(_COMPILER_PREFIXES) and name not in NEUTRAL_VARIABLES
    }
    assembler = variables.pop(_ASSEMBLER, None)
    # Inductor points to torch's own once it has compiled something; that one belongs to torch's version.
    if assembler is not None and Path(assembler) != Path(torch.__file__).parent / "bin" / "ptxas":
        variables[_ASSEMBLER] = _digest_of_file(assembler)
    return variables


@functools.cache
def _digest_of_file(path: str) -> str:
    """Stands for a program wherever it lies; its name if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return Path(path).name


@functools.cache
def source_digests() -> dict[str, str]:
    """A digest of every source file that compiled code can depend on, by its path in the repository."""
    root = Path(__file__).parents[2]
    digests = {}
    for package in _TRACED_PACKAGES:
        path = root / package
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digests[file.relative_to(root).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return digests


def _cuda_factors(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "num_sms": properties.multi_processor_count,
    }


def _cpu_factors() -> dict[str, Any]:
    # Inductor writes the number of threads and the widest vectors of this machine into its C++.
    return {
        "device": "cpu",
        "isa": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "instruction_sets": _instruction_sets(),
        "num_threads": torch.get_num_threads(),
        "cxx_major": _cxx_major(os.environ.get("CXX", "g++")),
        "native_kernels": cpu_ops.is_available(),
    }


@functools.cache
def _instruction_sets() -> str:
    """What this processor can run of what ``-march=native``, Inductor's default, may emit.

    Two processors of one capability by torch's count can differ in AMX or bf16 instructions.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return " ".join(sorted({flag for flag in flags if _INSTRUCTION_SET.match(flag)}))


@functools.cache
def _cxx_major(compiler: str) -> str | None:
    """Major version of the C++ compiler, which decides the ABI of what it builds; None where there is none."""
    if shutil.which(compiler) is None:
        return None
    result = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True)
    return f"{Path(compiler).name} {result.stdout.strip().partition('.')[0]}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
