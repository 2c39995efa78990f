"""A memory pool on the host that behaves as a CUDA graph pool does.

Blocks stay at their addresses as long as the pool lives. A block is busy while some tensor that owns it (or a view
of one) is alive, and is reused afterwards, although held aliases still point at it. So the memory of a series of
captures, largest first, is that of the largest one and not the sum.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch


class HostPool:
    """Memory for the outputs of host graphs."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    @property
    def bytes_held(self) -> int:
        """Bytes of all blocks, free ones included."""
        return sum(block.num_bytes for block in self._blocks)

    def put(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy ``tensor`` into the pool, with its strides.

        Returns:
            A tensor that keeps its block busy while it or a view of it lives, and an alias that does not.
        """
        block = self._take(_extent_bytes(tensor))
        with _plain_tensors():
            owner, alias = _shaped(block.owner(), tensor), _shaped(block.memory, tensor)
            alias.copy_(tensor)
        return owner, alias

    def alias(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The same memory as ``tensor`` without keeping its block busy; None if it is not in the pool."""
        address = tensor.untyped_storage().data_ptr()
        for block in self._blocks:
            if block.memory.data_ptr() == address:
                with _plain_tensors():
                    return _shaped(block.memory, tensor, int(tensor.storage_offset()))
        return None

    def release(self) -> None:
        """Give back every block; no graph uses the pool any more."""
        self._blocks.clear()

    def _take(self, num_bytes: int) -> _Block:
        free = [block for block in self._blocks if not block.is_busy and block.num_bytes >= num_bytes]
        if free:
            return min(free, key=lambda block: block.num_bytes)
        block = _Block(max(num_bytes, 1))
        self._blocks.append(block)
        return block


class _Block:
    def __init__(self, num_bytes: int) -> None:
        with _plain_tensors():
            self.memory = torch.zeros(num_bytes, dtype=torch.uint8)
        self.num_bytes = num_bytes
        self.is_busy = False

    def owner(self) -> torch.Tensor:
        """The block's memory behind a storage of its own, whose end frees the block."""
        assert not self.is_busy
        self.is_busy = True
        # A tensor made from an array keeps that array alive until its storage, which views share, is freed.
        array = self.memory.numpy()[:]
        weakref.finalize(array, self._free).atexit = False
        return torch.from_numpy(array)

    def _free(self) -> None:
        self.is_busy = False


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """Tensors that may be written both inside and outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _extent_bytes(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _shaped(memory: torch.Tensor, like: torch.Tensor, storage_offset: int = 0) -> torch.Tensor:
    """``memory`` (bytes) as a tensor with the dtype, shape and strides of ``like``."""
    num_items = memory.numel() // like.element_size()
    typed = memory[: num_items * like.element_size()].view(like.dtype)
    return typed.as_strided(like.shape, like.stride(), storage_offset)
