# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""The first of the largest values of every row, in two small kernels that read the logits once, in their own dtype.

``torch.argmax`` gives a row to one multiprocessor: 28 us for one row of 128256 on an H100, 63 us for 256 of them, and
half as much again to make them fp32 first. Needs triton, so only :mod:`workers.sampling.selection` imports it, once
there is a CUDA tensor.

Shape suffixes: R rows, V vocabulary, C chunks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Values that a program reads at a time.
_TILE = 2048
#: Programs wanted: several for each multiprocessor.
_MIN_PROGRAMS = 512
#: Most chunks of a row.
_MAX_CHUNKS = 128


@triton.jit(do_not_specialize=["num_chunks"])
def _best_of_chunk(values_RV, best_ptr, index_ptr, stride, vocab_size, num_chunks, chunk, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    begin = part * chunk
    end = tl.minimum(begin + chunk, vocab_size)
    best = float("-inf")
    index = begin
    for first in range(begin, end, TILE):
        ids = first + tl.arange(0, TILE)
        x = tl.load(values_RV + row * stride + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        x = tl.where(x != x, float("inf"), x)  # torch, too, takes NaN for the largest
        x = tl.where(ids < end, x, float("-inf"))
        value, position = tl.max(x, 0, return_indices=True)
        index = tl.where(value > best, first + position, index)
        best = tl.maximum(best, value)
    tl.store(best_ptr + row * num_chunks + part, best)
    tl.store(index_ptr + row * num_chunks + part, index)


@triton.jit(do_not_specialize=["num_chunks"])
def _best_of_row(best_ptr, index_ptr, out_ptr, num_chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    best = tl.load(best_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
    _, chunk = tl.max(best, 0, return_indices=True)
    tl.store(out_ptr + row, tl.load(index_ptr + row * num_chunks + chunk).to(tl.int64))


def argmax(values_RV: torch.Tensor) -> torch.Tensor:
    """int64 [R]: index of the first of each row's largest values; rows must be dense, and may be apart."""
    num_rows, vocab_size = values_RV.shape
    assert values_RV.stride(1) == 1
    wanted = min(triton.cdiv(_MIN_PROGRAMS, max(num_rows, 1)), triton.cdiv(vocab_size, _TILE), _MAX_CHUNKS)
    chunk = triton.cdiv(triton.cdiv(vocab_size, wanted), _TILE) * _TILE
    num_chunks = triton.cdiv(vocab_size, chunk)
    best = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=values_RV.device)
    index = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=values_RV.device)
    out_R = torch.empty(num_rows, dtype=torch.int64, device=values_RV.device)
    if num_rows == 0:
        return out_R
    _best_of_chunk[(num_rows, num_chunks)](
        values_RV, best, index, values_RV.stride(0), vocab_size, num_chunks, chunk, TILE=_TILE, num_warps=4
    )
    _best_of_row[(num_rows,)](best, index, out_R, num_chunks, CHUNKS=_MAX_CHUNKS, num_warps=4)
    return out_R
