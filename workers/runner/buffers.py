"""Pairs of host arrays and a device tensor that hold the same numbers.

A step's inputs are written into a host array and committed to the device tensor, whose address never changes:
that is what a captured graph needs. On a CPU both are the same memory and a commit costs nothing. On CUDA there
are two host arrays that take turns, so that step n + 1 can be prepared while step n's copy is still queued.
Knows nothing about what the numbers mean.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

#: Steps that may be in flight at once: one running, one being prepared.
_NUM_HOSTS = 2


class HostDeviceBuffer:
    """A persistent buffer with a host side (``np``) and a device side (``device``).

    Args:
        shape: Of both sides.
        dtype: Of both sides.
        device: Where the device side lives.
        fill: Initial value.
    """

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device, fill: int | float = 0) -> None:
        if device.type == "cpu":
            self.device = torch.full(shape, fill, dtype=dtype)
            self._hosts = [self.device]
        else:
            self._hosts = [torch.full(shape, fill, dtype=dtype, pin_memory=True) for _ in range(_NUM_HOSTS)]
            self.device = self._hosts[0].to(device)
        self._arrays = [host.numpy() for host in self._hosts]
        self._turn = 0
        self.np: npt.NDArray[Any] = self._arrays[0]

    def commit(self, num_rows: int) -> torch.Tensor:
        """Queue the copy of the first ``num_rows`` host rows to the device and return their device view.

        Afterwards ``np`` is the next host array, with stale contents: write every row that will be committed.
        """
        view = self.device[:num_rows]
        if len(self._hosts) > 1:
            view.copy_(self._hosts[self._turn][:num_rows], non_blocking=True)
            self._turn = (self._turn + 1) % len(self._hosts)
            self.np = self._arrays[self._turn]
        return view


class HostCopies:
    """Brings the results of steps to the host without waiting; takes turns like :class:`HostDeviceBuffer`.

    Args:
        max_rows: Of a result.
        device: Where results come from.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        # One more than steps in flight: a result may be read while the next step is launched.
        num_turns = _NUM_HOSTS + 1 if self._is_cuda else 0
        self._hosts = [torch.empty(max_rows, dtype=torch.int64, pin_memory=True) for _ in range(num_turns)]
        self._events = [torch.cuda.Event() for _ in range(num_turns)]  # type: ignore[no-untyped-call]  # PyTorch's gap
        self._turn = 0

    def start(self, values_R: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Queue the copy of an int64 result.

        Returns:
            Where it will be, until as many more results have come as may be in flight, and what to wait for; on a
            CPU the result itself, and nothing.
        """
        if not self._is_cuda:
            return values_R, None
        self._turn = (self._turn + 1) % len(self._hosts)
        host_R, done = self._hosts[self._turn][: len(values_R)], self._events[self._turn]
        host_R.copy_(values_R, non_blocking=True)
        done.record()
        return host_R, done
