"""The linear layer: a weight, an optional bias, and whichever kernel is fastest for them on this device.

Knows one matrix; knows nothing of the model around it.

Shape suffixes: T = tokens, K = input features, N = output features.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Linear(nn.Module):
    """``y = x W^T + b``, bias optional.

    ``weight`` is ``[N, K]`` until :meth:`finalize`, which is called once after loading and may replace it by a
    prepacked form; no second copy is kept.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight: nn.Parameter = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device), requires_grad=False
        )
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, dtype=dtype, device=device), requires_grad=False
            )
        else:
            self.register_parameter("bias", None)

    def finalize(self) -> None:
        """Prepare the weight for inference; call once, after loading."""

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """``[..., K]`` to ``[..., N]`` in the same dtype."""
        return F.linear(x_TK, self.weight, self.bias)
