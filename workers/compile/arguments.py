"""Whether a batch is one that the model was compiled for.

Compiled code without guards takes whatever it is given for what it expects; this looks first. Knows shapes and dtypes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch

from workers.compile.counters import CompileCounters
from workers.compile.errors import RecompileError
from workers.compile.plan import TensorSpec

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Expected:
    """What an argument must be.

    Attributes:
        fixed: Dimensions that do not vary, and their sizes.
    """

    name: str
    dtype: torch.dtype
    ndim: int
    dim: int
    fixed: tuple[tuple[int, int], ...]


class ArgumentCheck:
    """The arguments of one compiled model.

    Args:
        arguments: In the order of ``forward``'s parameters; those without a dtype are read by nobody.
        dynamic_dims: The varying dimension of each.
        where: ``file:line (name)`` of the model's code, for errors.
        counters: Counts batches that are refused.
    """

    def __init__(
        self, arguments: Sequence[TensorSpec], dynamic_dims: Sequence[int], where: str, counters: CompileCounters
    ) -> None:
        self._expected = [
            _expected(spec, dim) if spec.dtype else None for spec, dim in zip(arguments, dynamic_dims, strict=True)
        ]
        self._where = where
        self._counters = counters

    def size(self, args: Sequence[torch.Tensor]) -> int:
        """The one size of all dynamic dimensions.

        Raises:
            RecompileError: An argument has another dtype, rank or size than the model was compiled for.
        """
        size = -1
        for expected, arg in zip(self._expected, args, strict=True):
            if expected is None:
                continue
            if arg.dtype is not expected.dtype or arg.dim() != expected.ndim:
                raise self._refusal(expected, arg, size)
            if size < 0:
                size = arg.shape[expected.dim]
            if arg.shape[expected.dim] != size or any(arg.shape[dim] != fixed for dim, fixed in expected.fixed):
                raise self._refusal(expected, arg, size)
        return size

    def _refusal(self, expected: _Expected, arg: torch.Tensor, size: int) -> RecompileError:
        sizes = [f"{fixed} in dimension {dim}" for dim, fixed in expected.fixed]
        sizes += [f"{size} in dimension {expected.dim}"] if size >= 0 else []
        message = (
            f"{self._where} would compile again while serving: {expected.name} is {arg.dtype} {tuple(arg.shape)}, and"
            f" the model was compiled for {expected.dtype} with {expected.ndim} dimensions"
        )
        message = ", ".join([message, *sizes])
        self._counters.num_recompiles_refused += 1
        logger.error("%s", message)
        return RecompileError(message)


def _expected(spec: TensorSpec, dim: int) -> _Expected:
    ndim = len(spec.shape)
    fixed = tuple(
        (index, size) for index, size in enumerate(spec.shape) if index != dim % ndim and isinstance(size, int)
    )
    return _Expected(spec.name, getattr(torch, spec.dtype.removeprefix("torch.")), ndim, dim % ndim, fixed)
