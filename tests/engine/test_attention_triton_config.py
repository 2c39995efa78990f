"""What the Triton backend refuses, and whose release it goes by, before any kernel is made; runs without triton."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch

from workers.attention.base import AttentionSpec
from workers.attention.triton_paged import TritonPagedAttention, _default_prefill_tile
from workers.errors import ConfigError


def make_backend(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> TritonPagedAttention:
    return TritonPagedAttention(AttentionSpec(4, 2, head_dim, 1.0, 16, dtype), torch.device("cpu"))


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package triton"):
        make_backend()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float32}, "set dtype to bfloat16"),
        ({"head_dim": 72}, "multiples of 16 up to 256, not 72"),
        ({"head_dim": 512}, "multiples of 16 up to 256, not 512"),
    ],
)
def test_unsupported_models_are_refused(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=message):
        make_backend(**options)


@pytest.mark.parametrize(
    ("device", "release", "is_hopper"), [("cuda", "3.6.0", True), ("cuda", "3.7.0", False), ("cpu", "3.6.0", False)]
)
def test_the_release_is_of_the_triton_that_runs_whatever_its_distribution_is_called(
    monkeypatch: pytest.MonkeyPatch, device: str, release: str, is_hopper: bool
) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=release))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    spec = AttentionSpec(4, 2, 128, 1.0, 16, torch.bfloat16)
    assert _default_prefill_tile(spec, torch.device(device)).hopper is is_hopper
