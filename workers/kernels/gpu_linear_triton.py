# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""Matrix products of one token, or of a few with a very wide weight: bound by the reading of the weight.

A library's kernels are made for large matrices; for one row they leave an eighth of the memory's bandwidth unused, a
quarter where the weight is small. Here one row is a plain reduction, launched while the kernel before it drains; a
projection to gate and up halves is activated in the same kernel. A language-model head has columns enough to fill the
device with one tile of rows each.

Needs triton, so only :mod:`workers.kernels.gpu_linear` imports it, once there is a CUDA tensor.

Shape suffixes: M = rows (tokens), K = input features, N = output features (of one half, if there are two).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.kernels.triton_launch import KernelLaunch, compile_all


@triton.jit
def _silu_mul(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["num_columns"])
def row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_columns,
    num_features,
    PAIRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row: program p makes columns ``[p * BLOCK_N, (p + 1) * BLOCK_N)``, of both halves."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_K)
    rows = weight_ptr + columns.to(tl.int64)[:, None] * num_features
    partner = num_columns.to(tl.int64) * num_features
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    # The next kernel may start to be launched; this one waits until the results of the one before are there.
    gdc_launch_dependents()
    gdc_wait()
    for k in range(0, num_features, BLOCK_K):
        inside = (k + features) < num_features
        live = inside[None, :] & (columns < num_columns)[:, None]
        x = tl.load(x_ptr + k + features, mask=inside, other=0.0).to(tl.float32)[None, :]
        acc += x * tl.load(rows + (k + features)[None, :], mask=live, other=0.0).to(tl.float32)
        if PAIRED:
            acc_up += x * tl.load(rows + partner + (k + features)[None, :], mask=live, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    if PAIRED:
        # Rounded in between, as the product is where it is a kernel of its own.
        y = _silu_mul(y.to(dtype).to(tl.float32), tl.sum(acc_up, 1).to(dtype).to(tl.float32))
    tl.store(y_ptr + columns, y.to(dtype), mask=columns < num_columns)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def tile_kernel(
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
    """Up to BLOCK_M rows: program p makes columns ``[p * BLOCK_N, (p + 1) * BLOCK_N)`` of all of them."""
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


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """Shape of a tile program."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: By the most rows that a tile takes, widest last.
TILES = {16: Tile(16, 32, 128, 4, 5), 32: Tile(32, 64, 128, 4, 4), 64: Tile(64, 64, 128, 4, 4)}
#: Columns and features of a row program; paired programs have two of each column.
_ROW_COLUMNS, _ROW_FEATURES, _ROW_WARPS = 2, 2048, 8
_SILU_BLOCK, _SILU_WARPS = 2048, 8


class LinearKernels:
    """The kernels for one dtype, compiled side by side."""

    def __init__(self, dtype: torch.dtype) -> None:
        # Any number of columns, and features that are a multiple of 16: only then are loads 16 bytes wide.
        sizes = (2, 16)
        self._rows = {
            (paired, has_bias): KernelLaunch(
                row_kernel,
                (dtype, dtype, dtype, dtype, *sizes),
                (paired, has_bias, 1 if paired else _ROW_COLUMNS, _ROW_FEATURES),
                num_warps=_ROW_WARPS,
                num_stages=3,
                launch_pdl=True,
            )
            for paired, has_bias in ((False, False), (False, True), (True, False))
        }
        self._tiles = {
            rows: KernelLaunch(
                tile_kernel,
                (dtype, dtype, dtype, 2, *sizes),
                (tile.block_m, tile.block_n, tile.block_k),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
            for rows, tile in TILES.items()
        }
        self._silu = KernelLaunch(silu_and_mul_kernel, (dtype, dtype, 16), (_SILU_BLOCK,), num_warps=_SILU_WARPS)

    def launches(self) -> list[KernelLaunch]:
        """Every kernel."""
        return [*self._rows.values(), *self._tiles.values(), self._silu]

    def row(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, paired: bool) -> torch.Tensor:
        """``[1, K]`` to ``[1, N]``."""
        num_columns = weight.shape[0] // 2 if paired else weight.shape[0]
        y = x.new_empty(*x.shape[:-1], num_columns)
        grid = (num_columns if paired else triton.cdiv(num_columns, _ROW_COLUMNS), 1, 1)
        launch = self._rows[paired, bias is not None]
        launch(grid, x, weight, weight if bias is None else bias, y, num_columns, weight.shape[1])
        return y

    def tile(self, x_MK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``[M, K]`` to ``[M, N]``."""
        num_rows, num_columns = x_MK.shape[0], weight.shape[0]
        y_MN = x_MK.new_empty(num_rows, num_columns)
        most = next(rows for rows in TILES if rows >= num_rows)
        grid = (triton.cdiv(num_columns, TILES[most].block_n), 1, 1)
        self._tiles[most](grid, x_MK, weight, y_MN, num_rows, num_columns, weight.shape[1])
        return y_MN

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``[M, 2N]`` to ``[M, N]``."""
        num_rows, num_columns = gate_up.shape[0], gate_up.shape[1] // 2
        y_MN = gate_up.new_empty(num_rows, num_columns)
        if num_rows:
            self._silu((num_rows, triton.cdiv(num_columns, _SILU_BLOCK), 1), gate_up, y_MN, num_columns)
        return y_MN


@functools.cache
def linear_kernels(dtype: torch.dtype, device_index: int) -> LinearKernels:
    """The kernels for a dtype, loaded into the current device's context."""
    kernels = LinearKernels(dtype)
    compile_all(kernels.launches())
    return kernels
