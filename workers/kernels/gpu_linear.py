"""Linear layers on a GPU as opaque operators, each product by the fastest kernel for its sizes.

Products of one row, of a few, and of up to 64 with a language-model head have kernels of their own where there is
Triton (:mod:`workers.kernels.gpu_linear_triton`); everything else is cuBLAS's. The choice is made when the operator
runs, so one compiled piece and one plan serve every batch size, and a captured graph holds the choice for its own.

Shape suffixes: M = rows (tokens), K = input features, N = output features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from workers.kernels import reference
from workers.kernels.triton_found import has_triton

if TYPE_CHECKING:
    from workers.kernels.gpu_linear_triton import LinearKernels

_DTYPES = (torch.bfloat16, torch.float16)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x W^T + b``: ``[..., K]`` to ``[..., N]``.

    Kernels of our own read ``weight`` while the kernel before them still runs; that must not be what writes it.
    """
    kernels = _kernels(x, weight)
    y = None if kernels is None else kernels.product(x, weight, bias, paired=False)
    return F.linear(x, weight, bias) if y is None else y


def linear_silu_and_mul(x_MK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``x W^T`` = cat(gate, up): ``[M, K]`` to ``[M, N]`` for a weight ``[2N, K]``.

    As to when the weight is read, see :func:`linear`.
    """
    kernels = _kernels(x_MK, weight)
    if kernels is None or weight.shape[0] % 32:
        return reference.silu_and_mul(F.linear(x_MK, weight))
    y_MN = kernels.product(x_MK, weight, None, paired=True)
    return kernels.silu_and_mul(F.linear(x_MK, weight)) if y_MN is None else y_MN


def prepare(dtype: torch.dtype, device: torch.device) -> None:
    """Have every kernel compiled and loaded, so that none is while serving, and cuBLAS's newer library in use.

    cublasLt is asked for because its choices are as good at most sizes and better at some: 46 instead of 54 us for
    128 rows through Llama-8B's down projection on an H100.
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.preferred_blas_library("cublaslt")
    if dtype in _DTYPES and has_triton():
        _loaded(dtype, device)


def _kernels(x: torch.Tensor, weight: torch.Tensor) -> LinearKernels | None:
    """The kernels for these tensors, or None if they are not for them."""
    if not x.is_cuda or x.dtype not in _DTYPES or not has_triton():
        return None
    if not x.is_contiguous() or not weight.is_contiguous() or weight.shape[1] % 16:
        return None
    return _loaded(x.dtype, x.device)


def _loaded(dtype: torch.dtype, device: torch.device) -> LinearKernels:
    from workers.kernels.gpu_linear_triton import linear_kernels

    index = torch.cuda.current_device() if device.index is None else device.index
    return linear_kernels(dtype, index)


def _define(schema: str, kernel: Any, fake: Any) -> None:
    # torch.library carries no annotations.
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _LIBRARY._register_fake(name, fake)  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("warmgraph", "FRAGMENT")  # type: ignore[no-untyped-call]
_define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    linear,
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
_define(
    "linear_silu_and_mul(Tensor x, Tensor weight) -> Tensor",
    linear_silu_and_mul,
    lambda x, weight: x.new_empty((*x.shape[:-1], weight.shape[0] // 2)),
)
