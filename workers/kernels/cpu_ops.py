"""``torch.ops.warmgraph``: the operators with native CPU kernels, opaque to a compiler.

Knows how to hand tensors to the C functions of ``cpu_*.cpp`` and when not to: other dtypes, odd strides, or a
machine where the kernels could not be built take the plain form. Registered through ``torch.library.Library``,
because ``torch.library.custom_op`` imports the compiler.

Shape suffixes: T = tokens, N = (output) features, K = input features or KV heads, H = query heads, D = head size,
P = positions.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch.nn import functional as F

from workers.kernels import native, reference

#: Columns of a panel of a packed weight (cpu_tile.h).
PANEL = 32

#: Argument types of every kernel (cpu_kernels.h); none returns anything.
SIGNATURES: dict[str, list[Any]] = {
    "wg_pack": [c_void_p, c_void_p, c_int64, c_int64, c_int, c_int],
    "wg_unpack_rows": [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int, c_int],
    "wg_copy_rows": [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int],
    "wg_linear": [c_void_p, c_int64, *[c_void_p] * 3, c_int, *[c_int64] * 3, c_int, c_int],
    "wg_rms_norm": [c_void_p, c_int64, c_int64, *[c_void_p] * 4, c_int64, c_int64, c_float, c_int, c_int],
    "wg_silu_and_mul": [c_void_p, c_void_p, c_int64, c_int64, c_int, c_int],
    "wg_rope": [*[c_void_p, c_int64, c_int64] * 2, *[c_void_p] * 4, c_int64, c_int64, c_int, c_int],
    "wg_attention": [c_void_p, *[c_void_p, c_int64] * 3, c_void_p, c_void_p],
    "wg_run_program": [c_void_p, c_int64, c_void_p, c_int64, c_int],
}


_stand_in: Any = None


@functools.cache
def _load() -> Any:
    loaded = native.library()
    if loaded is not None:
        for name, argtypes in SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = argtypes, None
    return loaded


def library() -> Any:
    """The native kernels with their signatures declared, or None where there are none."""
    return _load() if _stand_in is None else _stand_in


@contextlib.contextmanager
def stand_in(kernels: Any) -> Iterator[None]:
    """Let another object take the kernels' place: a recorder, which passes calls on."""
    global _stand_in
    _stand_in, before = kernels, _stand_in
    try:
        yield
    finally:
        _stand_in = before


def is_available() -> bool:
    """Whether the native kernels are (or can be) built and loaded; the first call may take seconds."""
    return library() is not None


def supports(dtype: torch.dtype) -> bool:
    """Whether the native kernels compute in this dtype."""
    return dtype is torch.bfloat16 or dtype is torch.float32


def _usable(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the native kernels take these: one supported dtype, last dimension contiguous."""
    dtype = x.dtype
    if not (dtype is torch.bfloat16 or dtype is torch.float32) or library() is None:
        return False
    return x.stride(-1) == 1 and all(other.dtype is dtype and other.is_contiguous() for other in others)


def embedding(ids: torch.Tensor, weight_VN: torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` (int64) of a table: ``[...]`` to ``[..., N]``."""
    if library() is None or not weight_VN.is_contiguous():
        return F.embedding(ids, weight_VN)
    ids = ids.contiguous()
    size = weight_VN.shape[1]
    rows = torch.empty((*ids.shape, size), dtype=weight_VN.dtype)
    library().wg_copy_rows(
        ids.data_ptr(), weight_VN.data_ptr(), rows.data_ptr(), ids.numel(), size * rows.element_size(),
        torch.get_num_threads(),
    )  # fmt: skip
    return rows


def rms_norm(x: torch.Tensor, weight_N: torch.Tensor, eps: float) -> torch.Tensor:
    """Native :func:`workers.kernels.reference.rms_norm`."""
    if not _usable(x, weight_N):
        return reference.rms_norm(x, weight_N, eps)
    size = weight_N.shape[0]
    if x.dim() == 3 and x.stride(1) == size:  # the heads of each token, as in a slice of a fused projection
        x_stride, rows_per_token = x.stride(0), x.shape[1]
    elif x.dim() == 2:
        x_stride, rows_per_token = x.stride(0), 1
    else:
        x = x.contiguous()
        x_stride, rows_per_token = size, 1
    y = torch.empty(x.shape, dtype=x.dtype)
    library().wg_rms_norm(
        x.data_ptr(), x_stride, rows_per_token, None, weight_N.data_ptr(), y.data_ptr(), None,
        x.numel() // size, size, eps, x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight_N: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Native :func:`workers.kernels.reference.add_rms_norm`."""
    if not _usable(x, residual, weight_N) or not x.is_contiguous():
        return reference.add_rms_norm(x, residual, weight_N, eps)
    size = weight_N.shape[0]
    y, new_residual = torch.empty_like(x), torch.empty_like(x)
    library().wg_rms_norm(
        x.data_ptr(), size, 1, residual.data_ptr(), weight_N.data_ptr(), y.data_ptr(), new_residual.data_ptr(),
        x.numel() // size, size, eps, x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return y, new_residual


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Native :func:`workers.kernels.reference.silu_and_mul`."""
    if not _usable(gate_up) or not gate_up.is_contiguous():
        return reference.silu_and_mul(gate_up)
    size = gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype)
    library().wg_silu_and_mul(
        gate_up.data_ptr(), y.data_ptr(), y.numel() // size, size, y.dtype is torch.bfloat16, torch.get_num_threads()
    )
    return y


def apply_rope(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor, cos_sin_cache_PD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Native :func:`workers.kernels.reference.apply_rope`."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_TKD.shape[1]
    if (
        not _usable(q_THD)
        or k_TKD.dtype is not q_THD.dtype
        or q_THD.stride()[1:] != (head_dim, 1)
        or k_TKD.stride()[1:] != (head_dim, 1)
        or cos_sin_cache_PD.dtype is not torch.float32
        or not (positions_T.is_contiguous() and cos_sin_cache_PD.is_contiguous())
    ):
        return reference.apply_rope(q_THD, k_TKD, positions_T, cos_sin_cache_PD)
    q_out, k_out = torch.empty(q_THD.shape, dtype=q_THD.dtype), torch.empty(k_TKD.shape, dtype=k_TKD.dtype)
    library().wg_rope(
        q_THD.data_ptr(), q_THD.stride(0), num_heads, k_TKD.data_ptr(), k_TKD.stride(0), num_kv_heads,
        positions_T.data_ptr(), cos_sin_cache_PD.data_ptr(), q_out.data_ptr(), k_out.data_ptr(),
        num_tokens, head_dim, q_THD.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return q_out, k_out


def pack_weight(weight_NK: torch.Tensor) -> torch.Tensor:
    """Reorder a weight into panels (cpu_tile.h), in place where no padding is needed.

    Returns:
        The packed weight, ``[N padded to 32, K padded to 32 (bf16) or K (fp32)]``: the same tensor, or a new one.
        Its rows are no longer those of the weight; :func:`packed_rows` reads them.
    """
    assert supports(weight_NK.dtype)
    assert weight_NK.is_contiguous()
    num_rows, num_columns = weight_NK.shape
    is_bf16 = weight_NK.dtype is torch.bfloat16
    shape = (-(-num_rows // PANEL) * PANEL, -(-num_columns // PANEL) * PANEL if is_bf16 else num_columns)
    packed = weight_NK if shape == weight_NK.shape else torch.empty(shape, dtype=weight_NK.dtype)
    library().wg_pack(weight_NK.data_ptr(), packed.data_ptr(), num_rows, num_columns, is_bf16, torch.get_num_threads())
    return packed


def packed_linear(
    x: torch.Tensor,
    packed_weight: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_features: int,
    out_fp32: bool = False,
) -> torch.Tensor:
    """``x W^T + bias`` for a weight from :func:`pack_weight`: ``[..., K]`` to ``[..., N]``, in ``x.dtype`` or fp32."""
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    in_features = x.shape[-1]
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32 if out_fp32 else x.dtype)
    library().wg_linear(
        x.data_ptr(), x.stride(0) if x.dim() == 2 else in_features, packed_weight.data_ptr(),
        None if bias_N is None else bias_N.data_ptr(), y.data_ptr(), out_fp32, x.numel() // in_features, out_features,
        in_features, x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return y


def packed_rows(ids: torch.Tensor, packed_weight: torch.Tensor, in_features: int) -> torch.Tensor:
    """Rows ``ids`` (int64) of the weight that was packed: ``[...]`` to ``[..., K]``."""
    ids = ids.contiguous()
    rows = torch.empty((*ids.shape, in_features), dtype=packed_weight.dtype)
    library().wg_unpack_rows(
        ids.data_ptr(), packed_weight.data_ptr(), rows.data_ptr(), ids.numel(), in_features,
        rows.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return rows


class AttentionStep(ctypes.Structure):
    """``WgAttention`` of cpu_kernels.h: one step's geometry, as addresses and sizes."""

    _fields_ = (
        *((name, c_int64) for name in ("num_reqs", "num_tokens", "num_heads", "num_kv_heads", "head_dim")),
        *((name, c_int64) for name in ("block_size", "window", "block_table_stride")),
        *((name, c_void_p) for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping")),
        ("scale", c_float),
        ("is_bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def paged_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    kv_cache: torch.Tensor,
    step: Any,
    out_THD: torch.Tensor,
) -> None:
    """Write k and v to the cache ``[B, 2, K, S, D]``, then attend; ``step`` is a reference to an AttentionStep."""
    q_THD, k_TKD, v_TKD = (_dense_heads(x) for x in (q_THD, k_TKD, v_TKD))
    assert kv_cache.is_contiguous()
    assert out_THD.is_contiguous()
    assert kv_cache.dtype is q_THD.dtype is out_THD.dtype
    library().wg_attention(
        step, q_THD.data_ptr(), q_THD.stride(0), k_TKD.data_ptr(), k_TKD.stride(0), v_TKD.data_ptr(), v_TKD.stride(0),
        kv_cache.data_ptr(), out_THD.data_ptr(),
    )  # fmt: skip


def _dense_heads(x_THD: torch.Tensor) -> torch.Tensor:
    """Heads and dimensions side by side; tokens may be apart, as in a slice of a fused projection."""
    return x_THD if x_THD.stride()[1:] == (x_THD.shape[2], 1) else x_THD.contiguous()


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # torch.library carries no annotations.
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, fake, "Meta")  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("warmgraph", "FRAGMENT")  # type: ignore[no-untyped-call]
_define(
    "embedding(Tensor ids, Tensor weight) -> Tensor",
    embedding,
    lambda ids, weight: weight.new_empty((*ids.shape, weight.shape[-1])),
)
_define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm, lambda x, weight, eps: torch.empty_like(x))
_define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    add_rms_norm,
    lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
)
_define(
    "silu_and_mul(Tensor gate_up) -> Tensor",
    silu_and_mul,
    lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
_define(
    "apply_rope(Tensor q, Tensor k, Tensor positions, Tensor cos_sin_cache) -> (Tensor, Tensor)",
    apply_rope,
    lambda q, k, positions, cos_sin_cache: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
_define(
    "packed_linear(Tensor x, Tensor packed_weight, Tensor? bias, int out_features, bool out_fp32=False) -> Tensor",
    packed_linear,
    lambda x, packed_weight, bias, out_features, out_fp32=False: x.new_empty(
        (*x.shape[:-1], out_features), dtype=torch.float32 if out_fp32 else x.dtype
    ),
)
_define(
    "packed_rows(Tensor ids, Tensor packed_weight, int in_features) -> Tensor",
    packed_rows,
    lambda ids, packed_weight, in_features: packed_weight.new_empty((*ids.shape, in_features)),
)
