"""Backends are chosen by name and device, and imported only then."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.paged import CPU
from workers.attention import selector
from workers.attention.base import AttentionSpec
from workers.attention.sdpa import SdpaPagedAttention
from workers.attention.selector import make_backend
from workers.errors import ConfigError

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, block_size=16, dtype=torch.float32)


def test_by_name() -> None:
    backend = make_backend("sdpa", SPEC, CPU)
    assert type(backend) is SdpaPagedAttention
    assert backend.spec == SPEC


def test_auto_takes_one_that_runs_on_the_device() -> None:
    assert make_backend("auto", SPEC, CPU).name in ("cpu", "sdpa")


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="valid names are auto, triton, cpu, sdpa") as caught:
        make_backend("flash", SPEC, CPU)
    assert caught.value.param == "attention_backend"


def test_wrong_device() -> None:
    with pytest.raises(ConfigError, match="does not run on cpu; use one of auto, cpu, sdpa"):
        make_backend("triton", SPEC, CPU)


def test_what_cannot_be_imported_is_an_error_by_name_and_a_warning_by_auto(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = selector._Home("workers.attention.absent", "Absent", ("cpu",))
    monkeypatch.setattr(selector, "_BACKENDS", {"absent": home, "sdpa": selector._BACKENDS["sdpa"]})
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_backend("absent", SPEC, CPU)
    with caplog.at_level(logging.WARNING):
        assert make_backend("auto", SPEC, CPU).name == "sdpa"
    assert "absent is not used" in caplog.text
