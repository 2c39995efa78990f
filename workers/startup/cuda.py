"""Brings CUDA up before torch is there, through the driver's own interface, so that it takes no time of its own.

torch later uses the same primary context. Where there is no driver nothing happens, and nothing is decided here: a
device that cannot be had is torch's to complain about.
"""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)


def device_index(device: str) -> int | None:
    """The CUDA device that an engine's ``device`` setting will take, if there is one; None for the CPU."""
    if device in ("auto", "cuda"):
        return 0
    kind, _, index = device.partition(":")
    return int(index) if kind == "cuda" and index.isdigit() else None


def has_driver() -> bool:
    """Whether there is a CUDA driver on this machine."""
    return _driver() is not None


def initialize_driver(index: int) -> bool:
    """Make the device's primary context; returns whether that went well."""
    driver = _driver()
    if driver is None:
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    status: int = driver.cuInit(0)
    status = status or driver.cuDeviceGet(ctypes.byref(device), index)
    # Kept until the process ends.
    status = status or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    if status:
        logger.debug("the CUDA driver answered %d", status)
    return not status


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
