"""What compiled code depends on besides the model: machine, versions, sources.

Everything is listed on purpose; what is not here is not part of a key. No paths, host names or times.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch

#: Raise it when compiled code changes in a way that no other factor shows.
FORMAT_VERSION = 1

#: Packages whose sources can be in a traced graph or decide what it looks like.
_TRACED_PACKAGES = ("workers/model", "workers/kernels", "workers/compile", "workers/attention/op.py")


def environment_factors(device: torch.device) -> dict[str, Any]:
    """The factors that every plan and piece on this machine has in common, by name."""
    factors: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__,
        "torch_git": torch.version.git_version,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "sources": _source_digest(),
    }
    return factors | (_cuda_factors(device) if device.type == "cuda" else _cpu_factors())


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
        "num_threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _source_digest() -> str:
    root = Path(__file__).parents[2]
    hashed = hashlib.sha256()
    for package in _TRACED_PACKAGES:
        path = root / package
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            hashed.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return hashed.hexdigest()
