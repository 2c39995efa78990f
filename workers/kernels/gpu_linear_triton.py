# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""Matrix products of one token or a few: bound by the reading of the weight.

A library's kernels are made for large matrices; for few rows they leave an eighth of the memory's bandwidth unused, a
quarter where the weight is small. Here one row is a plain reduction, and for a few rows the warps of a program share
out the input features of 16 columns, so that even a narrow weight has programs enough to fill the device. From Hopper
on both are launched while the kernel before them drains, and have the first weights brought meanwhile. A projection to
gate and up halves is activated in the same kernel. A language-model head has columns enough for tiles of more rows.

Needs triton, so only :mod:`workers.kernels.gpu_linear` imports it, once there is a CUDA tensor.

Shape suffixes: M = rows (tokens), K = input features, N = output features (of one half, if there are two).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from workers.kernels.linear_tuning import (
    FEW_ROWS_COLUMNS,
    FEW_ROWS_TILES,
    FEW_ROWS_WARPS,
    LONG_ROW,
    MAX_WIDE_ROWS,
    PAIRED_ROW,
    SHORT_ROW,
    WIDE_TILES,
    FewRowsTile,
    WideTile,
    few_rows_tile,
    row_tile,
    wide_tile,
)
from workers.kernels.overlap import wait_for_kernel_before
from workers.kernels.triton_launch import KernelLaunch, can_overlap_launches, compile_all, num_sms

#: Input features of each column of a few-rows program that are brought near while it waits for its turn.
_PREFETCHED_FEATURES = 1024


@triton.jit
def _silu_mul(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _prefetch(pointers):
    """Have these lines brought to the second-level cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["num_columns", "has_bias"])
def row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_columns,
    num_features,
    has_bias,
    PAIRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP_LAUNCH: tl.constexpr,
):
    """One row: program p makes columns ``[p * BLOCK_N, (p + 1) * BLOCK_N)``, of both halves."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_K)
    in_columns = columns < num_columns
    rows = weight_ptr + columns.to(tl.int64)[:, None] * num_features
    partner = num_columns.to(tl.int64) * num_features
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    # Weights are no result of the kernel before: the first of them are loaded while it drains.
    live = (features < num_features)[None, :] & in_columns[:, None]
    w = tl.load(rows + features[None, :], mask=live, other=0.0)
    if PAIRED:
        w_up = tl.load(rows + partner + features[None, :], mask=live, other=0.0)
    if OVERLAP_LAUNCH:
        wait_for_kernel_before()
    for k in range(0, num_features, BLOCK_K):
        x = tl.load(x_ptr + k + features, mask=(k + features) < num_features, other=0.0).to(tl.float32)[None, :]
        ahead = k + BLOCK_K + features
        live = (ahead < num_features)[None, :] & in_columns[:, None]
        acc += x * w.to(tl.float32)
        w = tl.load(rows + ahead[None, :], mask=live, other=0.0)
        if PAIRED:
            acc_up += x * w_up.to(tl.float32)
            w_up = tl.load(rows + partner + ahead[None, :], mask=live, other=0.0)
    dtype = y_ptr.dtype.element_ty
    y = tl.sum(acc, 1)
    y += tl.load(bias_ptr + columns, mask=in_columns & (has_bias != 0), other=0.0).to(tl.float32)
    if PAIRED:
        # Rounded in between, as the product is where it is a kernel of its own.
        y = _silu_mul(y.to(dtype).to(tl.float32), tl.sum(acc_up, 1).to(dtype).to(tl.float32))
    tl.store(y_ptr + columns, y.to(dtype), mask=in_columns)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "has_bias"])
def few_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    num_columns,
    num_features,
    has_bias,
    PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    PREFETCHED: tl.constexpr,
    OVERLAP_LAUNCH: tl.constexpr,
):
    """Up to BLOCK_M rows: program p makes columns ``[p * BLOCK_N, (p + 1) * BLOCK_N)`` of all of them, and both halves.

    One batched product per step, whose batch is the warps: each multiplies BLOCK_K features of its own.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    features = (tl.arange(0, WARPS) * BLOCK_K)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    in_columns = columns < num_columns
    in_rows = rows < num_rows
    w_rows = weight_ptr + columns.to(tl.int64)[None, :, None] * num_features
    x_rows = x_ptr + rows[None, None, :] * num_features
    partner = num_columns.to(tl.int64) * num_features
    acc = tl.zeros([WARPS, BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([WARPS, BLOCK_N, BLOCK_M], tl.float32)
    if OVERLAP_LAUNCH:
        lines = tl.minimum(tl.arange(0, PREFETCHED // 64) * 64, num_features - 1)
        first = weight_ptr + tl.minimum(columns, num_columns - 1).to(tl.int64)[:, None] * num_features + lines[None, :]
        _prefetch(first)
        if PAIRED:
            _prefetch(first + partner)
        wait_for_kernel_before()
    for k in range(0, num_features, WARPS * BLOCK_K):
        at = k + features
        inside = at < num_features
        x = tl.load(x_rows + at[:, :, None], mask=inside[:, :, None] & in_rows[None, None, :], other=0.0)
        live = inside[:, None, :] & in_columns[None, :, None]
        w = tl.load(w_rows + at[:, None, :], mask=live, other=0.0)
        acc = tl.dot(w, x, acc)
        if PAIRED:
            w_up = tl.load(w_rows + partner + at[:, None, :], mask=live, other=0.0)
            acc_up = tl.dot(w_up, x, acc_up)
    dtype = y_ptr.dtype.element_ty
    y = tl.sum(acc, 0)
    y += tl.load(bias_ptr + columns, mask=in_columns & (has_bias != 0), other=0.0).to(tl.float32)[:, None]
    if PAIRED:
        y = _silu_mul(y.to(dtype).to(tl.float32), tl.sum(acc_up, 0).to(dtype).to(tl.float32))
    out = y_ptr + rows.to(tl.int64)[None, :] * num_columns + columns[:, None]
    tl.store(out, y.to(dtype), mask=in_columns[:, None] & in_rows[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def wide_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    num_rows,
    num_columns,
    num_features,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Up to BLOCK_M rows and very many columns: program p makes columns ``[p * BLOCK_N, (p + 1) * BLOCK_N)``."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_K)
    live = (rows < num_rows)[:, None]
    inside = (columns < num_columns)[:, None]
    x_rows = x_ptr + rows[:, None] * num_features
    w_rows = weight_ptr + columns.to(tl.int64)[:, None] * num_features
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, num_features, BLOCK_K):
        x = tl.load(x_rows + (k + features)[None, :], mask=live, other=0.0)
        w = tl.load(w_rows + (k + features)[None, :], mask=inside, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc)
    y = y_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=live & (columns < num_columns)[None, :])


@triton.jit
def silu_and_mul_kernel(x_ptr, y_ptr, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    gate = tl.load(x_ptr + row * 2 * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + (row * 2 + 1) * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * num_columns + columns, _silu_mul(gate, up).to(y_ptr.dtype.element_ty), mask=inside)


_SILU_BLOCK, _SILU_WARPS = 2048, 8


class LinearKernels:
    """The kernels for one dtype, compiled side by side.

    Args:
        dtype: Of 2 bytes.
        overlap: Launch them while the kernel before drains.
        num_sms: Multiprocessors of the device.
    """

    def __init__(self, dtype: torch.dtype, *, overlap: bool, num_sms: int) -> None:
        self._num_sms = num_sms
        # Any number of columns, and features that are a multiple of 16: only then are loads 16 bytes wide.
        sizes = (2, 16)
        tensors = (dtype, dtype, dtype, dtype)
        self._rows = {
            (paired, tile): KernelLaunch(
                row_kernel,
                (*tensors, *sizes, 2),
                (paired, tile.block_n, tile.block_k, overlap),
                num_warps=tile.num_warps,
                num_stages=3,
                launch_pdl=overlap,
            )
            for paired, tile in ((False, SHORT_ROW), (False, LONG_ROW), (True, PAIRED_ROW))
        }
        self._few_rows = {
            (paired, tile): KernelLaunch(
                few_rows_kernel,
                (*tensors, 2, *sizes, 2),
                (paired, tile.block_m, FEW_ROWS_COLUMNS, tile.block_k, FEW_ROWS_WARPS, _PREFETCHED_FEATURES, overlap),
                num_warps=FEW_ROWS_WARPS,
                num_stages=tile.num_stages,
                launch_pdl=overlap,
            )
            for paired, tiles in FEW_ROWS_TILES.items()
            for tile in tiles
        }
        self._wide_tiles = {
            tile: KernelLaunch(
                wide_kernel,
                (dtype, dtype, dtype, 2, *sizes),
                (tile.block_m, tile.block_n, tile.block_k),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
            for tile in WIDE_TILES.values()
        }
        self._silu = KernelLaunch(silu_and_mul_kernel, (dtype, dtype, 16), (_SILU_BLOCK,), num_warps=_SILU_WARPS)

    def launches(self) -> list[KernelLaunch]:
        """Every kernel."""
        return [*self._rows.values(), *self._few_rows.values(), *self._wide_tiles.values(), self._silu]

    def product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, paired: bool
    ) -> torch.Tensor | None:
        """``x W^T + b``: ``[..., K]`` to ``[..., N]``; None where cuBLAS is as fast or faster.

        Args:
            paired: The weight has two halves, gate and up, and the result is activated.
        """
        num_columns, num_features = _sizes(weight, paired)
        num_rows = x.numel() // num_features
        if num_rows == 1:
            return self._row(x, weight, bias, paired)
        if not 1 < num_rows <= MAX_WIDE_ROWS:
            return None
        few = few_rows_tile(num_rows, num_columns, num_features, self._num_sms, paired=paired)
        if few is not None:
            return self._few(x, weight, bias, few, paired)
        wide = None if paired or bias is not None else wide_tile(num_rows, num_columns, num_features)
        return None if wide is None else self._wide(x, weight, wide)

    def _row(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, paired: bool) -> torch.Tensor:
        """``[..., K]`` with one row to ``[..., N]``."""
        num_columns, num_features = _sizes(weight, paired)
        tile = row_tile(num_features, paired=paired)
        y = x.new_empty(*x.shape[:-1], num_columns)
        self._rows[paired, tile](
            (triton.cdiv(num_columns, tile.block_n), 1, 1),
            x,
            weight,
            weight if bias is None else bias,
            y,
            num_columns,
            num_features,
            int(bias is not None),
        )
        return y

    def _few(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: FewRowsTile, paired: bool
    ) -> torch.Tensor:
        """``[..., K]`` with at most ``tile.block_m`` rows to ``[..., N]``."""
        num_columns, num_features = _sizes(weight, paired)
        y = x.new_empty(*x.shape[:-1], num_columns)
        self._few_rows[paired, tile](
            (triton.cdiv(num_columns, FEW_ROWS_COLUMNS), 1, 1),
            x,
            weight,
            weight if bias is None else bias,
            y,
            x.numel() // num_features,
            num_columns,
            num_features,
            int(bias is not None),
        )
        return y

    def _wide(self, x: torch.Tensor, weight: torch.Tensor, tile: WideTile) -> torch.Tensor:
        """``[..., K]`` with at most ``tile.block_m`` rows to ``[..., N]``."""
        num_columns, num_features = weight.shape
        y = x.new_empty(*x.shape[:-1], num_columns)
        grid = (triton.cdiv(num_columns, tile.block_n), 1, 1)
        self._wide_tiles[tile](grid, x, weight, y, x.numel() // num_features, num_columns, num_features)
        return y

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``[M, 2N]`` to ``[M, N]``."""
        num_rows, num_columns = gate_up.shape[0], gate_up.shape[1] // 2
        y_MN = gate_up.new_empty(num_rows, num_columns)
        if num_rows:
            self._silu((num_rows, triton.cdiv(num_columns, _SILU_BLOCK), 1), gate_up, y_MN, num_columns)
        return y_MN


def _sizes(weight: torch.Tensor, paired: bool) -> tuple[int, int]:
    """N and K."""
    return weight.shape[0] // 2 if paired else weight.shape[0], weight.shape[1]


@functools.cache
def linear_kernels(dtype: torch.dtype, device_index: int) -> LinearKernels:
    """The kernels for a dtype, loaded into the current device's context."""
    kernels = LinearKernels(dtype, overlap=can_overlap_launches(device_index), num_sms=num_sms(device_index))
    compile_all(kernels.launches())
    return kernels
