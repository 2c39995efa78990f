"""Mode VLLM_COMPILE: a model as pieces, split ops and weights, built cold or loaded warm.

The warm path is here in full: plan, pieces, weights, one generated function. It imports what the piece format needs and
nothing else. The cold path, in ``workers.compile.compiler``, is imported when it is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from workers.compile.counters import CompileCounters
from workers.compile.formats.base import make_format
from workers.compile.piece_set import PieceSet
from workers.compile.stitch import LoadedPiece, Runner, WrapPiece, stitch
from workers.compile.weights import tensor_spec


@dataclasses.dataclass(frozen=True, slots=True)
class _Check:
    """What an argument must be."""

    name: str
    dtype: torch.dtype
    ndim: int
    dim: int


class PiecewiseModel:
    """Runs a plan.

    Args:
        pieces: Plan and builds, fetched.
        weights: The model's parameters and buffers by name.
        sizes: Batch sizes to load builds of their own for.
        wrap_piece: Called for every piece call, in the order of the pass, for the runner of every size and then for
            those compiled for one size.
        counters: Counts loaded pieces.

    Raises:
        PlanMismatchError: The weights are not those the plan was compiled for, or there is no such build.
    """

    def __init__(
        self,
        pieces: PieceSet,
        weights: Mapping[str, torch.Tensor],
        *,
        sizes: Iterable[int] = (),
        wrap_piece: WrapPiece | None = None,
        counters: CompileCounters | None = None,
    ) -> None:
        plan = pieces.plan
        plan.check_weights({name: tensor_spec(name, tensor) for name, tensor in weights.items()})
        self.plan = plan
        self.piece_format = pieces.piece_format
        self._counters = counters if counters is not None else CompileCounters()
        self._checks = [
            _Check(spec.name, getattr(torch, spec.dtype.removeprefix("torch.")), len(spec.shape), dim)
            for spec, dim in zip(plan.arguments, plan.dynamic_dims, strict=True)
            if spec.dtype
        ]
        loader = make_format(pieces.piece_format)

        def runner(size: int | None) -> Runner:
            loaded: dict[str, LoadedPiece] = {}
            for key, build in zip(plan.pieces, pieces.builds([size]), strict=True):
                loaded[key] = loader.load(pieces.blobs[build.sha256])
                self._counters.num_loaded += 1
            return stitch(plan, loaded, weights, size=size, wrap_piece=wrap_piece)

        self._general = runner(None)
        self._by_size: dict[int, Callable[..., Any]] = {size: runner(size) for size in sizes}

    def __call__(self, *args: torch.Tensor) -> Any:
        """Run a batch; the dynamic dimensions of all arguments have one size.

        Raises:
            ValueError: An argument has another dtype, rank or size than the pieces were compiled for.
        """
        size = self._size(args)
        return self._by_size.get(size, self._general)(*args)

    def _size(self, args: tuple[torch.Tensor, ...]) -> int:
        first = self._checks[0]
        size = args[0].shape[first.dim]
        for check, arg in zip(self._checks, args, strict=True):
            if arg.dtype is not check.dtype or arg.dim() != check.ndim or arg.shape[check.dim] != size:
                raise ValueError(
                    f"{check.name} is {arg.dtype} {tuple(arg.shape)}; the model was compiled for {check.dtype} with"
                    f" {check.ndim} dimensions, {size} in dimension {check.dim}"
                )
        return size
