"""Example inputs of a piece, as a compiler should see them: for one size of the dynamic dimension, or for any.

The trace gives the dynamic dimension a size that nothing is known about, so that 0 and 1 are not special. A compiler
does worse with such sizes: Inductor, for one, scores every fusion by the bytes it saves, takes those of an unknown size
for zero, and leaves most kernels apart. So a piece is compiled for a symbol with a typical value instead. Whatever the
compiler concludes from that value is checked by nobody; it holds for one token too as long as the piece's operations
treat tokens alike.

Knows input specs and fake tensors only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from workers.compile.errors import PlanMismatchError
from workers.compile.plan import InputSpec

#: The typical size. Inductor picks launch shapes by it; the smallest power of two that fills a large GPU with rows.
TYPICAL_SIZE = 256

#: Arithmetic on numbered sizes, and nothing else.
_ARITHMETIC = re.compile(r"[n\d\s()+*/-]+")


def example_inputs(inputs: Sequence[InputSpec], size: int | None) -> list[torch.Tensor]:
    """Fake tensors of one fake mode.

    Args:
        size: Of every dynamic dimension; None stands for any size.

    Raises:
        PlanMismatchError: A size is not arithmetic.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shape_env = ShapeEnv(specialize_zero_one=False)
    value = _new_symbol(shape_env) if size is None else size
    with FakeTensorMode(shape_env=shape_env):
        return [_tensor(spec, value) for spec in inputs]


def _new_symbol(shape_env: Any) -> torch.SymInt:
    """A size with a typical value that no input's shape decides."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource("num_tokens")
    symbol = shape_env.create_symbol(TYPICAL_SIZE, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    size: torch.SymInt = shape_env.create_symintnode(symbol, hint=TYPICAL_SIZE, source=source)
    return size


def _tensor(spec: InputSpec, size: int | torch.SymInt) -> torch.Tensor:
    shape = [_evaluate(value, size) for value in spec.shape]
    stride = [_evaluate(value, size) for value in spec.stride]
    return torch.empty_strided(shape, stride, dtype=getattr(torch, spec.dtype), device=spec.device)


def _evaluate(value: int | str, size: int | torch.SymInt) -> int | torch.SymInt:
    """A size of a spec, where every size that varies is ``size``."""
    if isinstance(value, int):
        return value
    names = re.findall(r"n\d+", value)
    if not names or not _ARITHMETIC.fullmatch(value):
        raise PlanMismatchError(f"The plan is damaged: {value!r} is not a size.")
    result: int | torch.SymInt = eval(value, {"__builtins__": {}}, dict.fromkeys(names, size))
    return result
