"""What the Triton backend refuses, before any kernel is made; runs without triton."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from workers.attention.base import AttentionSpec
from workers.attention.triton_paged import TritonPagedAttention
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
