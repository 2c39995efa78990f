"""Tensors that do not own their memory, without a C++ extension.

A captured graph's outputs live in its pool, which outlives every tensor. Holding them weakly lets the pool reuse
their memory for the next capture, while the address stays known.
"""

from __future__ import annotations

import torch


def weak_ref_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory, with the same shape and strides, that does not keep the memory allocated.

    Only sound while something else does, such as a graph pool. Uses the constructor of PyTorch's own graph trees.
    """
    if tensor.numel() == 0:
        return tensor.detach()
    storage = tensor.untyped_storage()
    borrowed = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(borrowed, tensor.storage_offset(), tensor.shape, tensor.stride())
