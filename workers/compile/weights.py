"""A model's parameters and buffers as a plan names them.

Knows modules and nothing of compilers.
"""

from __future__ import annotations

import torch
from torch import nn

from workers.compile.plan import TensorSpec


def weight_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; one that is known under two names appears under both."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def tensor_spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    """A weight's shape, dtype and layout, as data."""
    return TensorSpec(name, str(tensor.dtype), tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())))
