"""The linear layer: a weight, an optional bias, and the fastest kernel for them on their device.

Knows one matrix; knows nothing of the model around it.

Shape suffixes: T = tokens, K = input features, N = output features.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import workers.kernels.gpu_linear  # noqa: F401  (defines the operators)
from workers.kernels import cpu_ops
from workers.kernels.functional import silu_and_mul


class Linear(nn.Module):
    """``y = x W^T + b``, bias optional.

    Attributes:
        weight: ``[N, K]`` until :meth:`finalize`; None if that packed it.
        packed_weight: The packed form, or None. There is never a second copy.
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
        self.weight: nn.Parameter | None = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device), requires_grad=False
        )
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self.packed_weight: torch.Tensor | None
        self.register_buffer("packed_weight", None, persistent=False)

    def finalize(self) -> None:
        """Prepare the weight for inference; call once, after loading.

        On a CPU the weight is packed, in place where its shape allows: whoever shares it must from then on read
        its rows through :meth:`rows`.
        """
        weight = self.weight
        if weight is None or not weight.is_cpu or not cpu_ops.supports(weight.dtype) or not cpu_ops.is_available():
            return
        self.packed_weight = cpu_ops.pack_weight(weight.data)
        self.weight = None

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, as an embedding looks them up: int64 ``[T]`` to ``[T, K]``."""
        if self.packed_weight is None:
            assert self.weight is not None
            return F.embedding(ids_T, self.weight)
        rows_TK: torch.Tensor = torch.ops.warmgraph.packed_rows(ids_T, self.packed_weight, self.in_features)
        return rows_TK

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        """``[..., K]`` to ``[..., N]`` in the same dtype."""
        y_TN: torch.Tensor
        if self.packed_weight is not None:
            y_TN = torch.ops.warmgraph.packed_linear(x_TK, self.packed_weight, self.bias, self.out_features)
            return y_TN
        assert self.weight is not None
        if x_TK.is_cpu:
            return F.linear(x_TK, self.weight, self.bias)
        y_TN = torch.ops.warmgraph.linear(x_TK, self.weight, self.bias)
        return y_TN

    def silu_and_mul(self, x_TK: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up`` of ``forward(x)`` = cat(gate, up): ``[T, K]`` to ``[T, N / 2]``."""
        if x_TK.is_cpu or self.bias is not None:
            return silu_and_mul(self(x_TK))
        y_TN: torch.Tensor = torch.ops.warmgraph.linear_silu_and_mul(x_TK, self.weight)
        return y_TN

    def logits(self, x_TK: torch.Tensor) -> torch.Tensor:
        """:meth:`forward` for a language-model head: fp32 sums, unrounded, where the weight is packed.

        Elsewhere the result stays in ``x_TK``'s dtype, which holds all there is of it; making it fp32 would cost a pass
        over the largest activation of a step.
        """
        if self.packed_weight is None:
            y_TN: torch.Tensor = self(x_TK)
            return y_TN
        logits_TN: torch.Tensor = torch.ops.warmgraph.packed_linear(
            x_TK, self.packed_weight, self.bias, self.out_features, True
        )
        return logits_TN
