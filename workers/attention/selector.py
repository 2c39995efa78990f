"""Chooses and makes the attention backend.

Knows every backend's name, home and devices, and imports none of them before it is chosen.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging

import torch

from workers.attention.base import AttentionBackend, AttentionSpec
from workers.errors import ConfigError

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclasses.dataclass(frozen=True, slots=True)
class _Home:
    """Where a backend lives and where it runs; no device types means everywhere."""

    module: str
    class_name: str
    device_types: tuple[str, ...] = ()

    def runs_on(self, device: torch.device) -> bool:
        return not self.device_types or device.type in self.device_types

    def make(self, spec: AttentionSpec, device: torch.device) -> AttentionBackend:
        backend: AttentionBackend = getattr(importlib.import_module(self.module), self.class_name)(spec, device)
        return backend


#: In order of preference: ``auto`` takes the first that runs on the device and can be made.
_BACKENDS = {
    "triton": _Home("workers.attention.triton_paged", "TritonPagedAttention", ("cuda",)),
    "cpu": _Home("workers.attention.cpu", "CpuPagedAttention", ("cpu",)),
    "sdpa": _Home("workers.attention.sdpa", "SdpaPagedAttention"),
}


def make_backend(name: str, spec: AttentionSpec, device: torch.device) -> AttentionBackend:
    """Make the backend called ``name``, or with ``auto`` the best one for the device.

    Raises:
        ConfigError: No such backend, not one for this device or model, or a module it needs is not installed.
    """
    if name == AUTO:
        return _make_best(spec, device)
    home = _BACKENDS.get(name)
    if home is None:
        valid = ", ".join((AUTO, *_BACKENDS))
        raise ConfigError(
            f"attention_backend {name!r} does not exist; valid names are {valid}.", param="attention_backend"
        )
    if not home.runs_on(device):
        valid = ", ".join((AUTO, *(other for other, home in _BACKENDS.items() if home.runs_on(device))))
        raise ConfigError(
            f"attention_backend {name!r} does not run on {device.type}; use one of {valid}.",
            param="attention_backend",
        )
    try:
        return home.make(spec, device)
    except ImportError as error:
        raise ConfigError(
            f"attention_backend {name!r} cannot be imported ({error}); use {AUTO!r}.",
            param="attention_backend",
        ) from error


def _make_best(spec: AttentionSpec, device: torch.device) -> AttentionBackend:
    """The first candidate that is installed and supports the model; the last one always does."""
    candidates = {name: home for name, home in _BACKENDS.items() if home.runs_on(device)}
    for name, home in candidates.items():
        try:
            backend = home.make(spec, device)
        except (ImportError, ConfigError) as error:
            logger.warning("attention backend %s is not used: %s", name, error)
            continue
        logger.info("attention backend: %s", name)
        return backend
    raise AssertionError(f"the reference backend runs everywhere, but not on {device}")
