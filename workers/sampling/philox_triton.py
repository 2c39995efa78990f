# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""``philox_uniform`` as one kernel: the ninety tiny ones of the torch version take 120 us even in a captured graph.

Needs triton, so only :mod:`workers.sampling.philox` imports it, once there is a CUDA tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 256


@triton.jit
def _uniform_kernel(seed_ptr, index_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    seed = tl.load(seed_ptr + rows, mask=inside, other=0).to(tl.uint64, bitcast=True)
    index = tl.load(index_ptr + rows, mask=inside, other=0)
    # 32-bit counters select Philox-4x32; ten rounds are the default.
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros([BLOCK], tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    mantissa = (first.to(tl.int64) << 21) | (second.to(tl.int64) >> 11)
    tl.store(out_ptr + rows, mantissa.to(tl.float64) * (1.0 / 9007199254740992), mask=inside)


def uniform(seed_R: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    """See :func:`workers.sampling.philox.philox_uniform`; both inputs contiguous."""
    out_R = torch.empty(seed_R.shape, dtype=torch.float64, device=seed_R.device)
    grid = (triton.cdiv(len(seed_R), _BLOCK),)
    _uniform_kernel[grid](seed_R, index_R, out_R, len(seed_R), BLOCK=_BLOCK)
    return out_R
