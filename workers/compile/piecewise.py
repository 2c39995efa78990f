"""Mode VLLM_COMPILE: a model as pieces, split ops and weights, built cold or loaded warm.

The warm path is here in full: plan, pieces, weights, one generated function. It imports what the piece format needs and
nothing else. The cold path, in ``workers.compile.compiler``, is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from workers.compile.arguments import ArgumentCheck
from workers.compile.counters import CompileCounters
from workers.compile.formats.base import make_format
from workers.compile.piece_set import PieceSet
from workers.compile.stitch import KeepRows, LoadedPiece, Runner, WrapPiece, stitch
from workers.compile.weights import tensor_spec


class PiecewiseModel:
    """Runs a plan.

    Args:
        pieces: Plan and builds, fetched.
        weights: The model's parameters and buffers by name.
        sizes: Batch sizes to load builds of their own for.
        wrap_piece: Called for every piece call, in the order of the pass, for the runner of every size and then for
            those compiled for one size.
        keep_rows: See :func:`workers.compile.stitch.stitch`; pieces compiled for one size do without.
        where: ``file:line (name)`` of the model's code, for errors.
        counters: Counts loaded pieces and refused batches.

    Attributes:
        loaded: Pieces by key and batch size, as they are before anything is put around them.

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
        keep_rows: KeepRows | None = None,
        where: str = "The model",
        counters: CompileCounters | None = None,
    ) -> None:
        plan = pieces.plan
        plan.check_weights({name: tensor_spec(name, tensor) for name, tensor in weights.items()})
        self.plan = plan
        self.piece_format = pieces.piece_format
        self._counters = counters if counters is not None else CompileCounters()
        self._check = ArgumentCheck(plan.arguments, plan.dynamic_dims, where, self._counters)
        loader = make_format(pieces.piece_format)

        self.loaded: dict[tuple[str, int | None], LoadedPiece] = {}

        def runner(size: int | None) -> Runner:
            loaded: dict[str, LoadedPiece] = {}
            for key, build in zip(plan.pieces, pieces.builds([size]), strict=True):
                loaded[key] = self.loaded[key, size] = loader.load(pieces.blobs[build.sha256])
                self._counters.num_loaded += 1
            keep = keep_rows if size is None else None
            return stitch(plan, loaded, weights, size=size, wrap_piece=wrap_piece, keep_rows=keep)

        self._general = runner(None)
        self._by_size: dict[int, Callable[..., Any]] = {size: runner(size) for size in sizes}

    def __call__(self, *args: torch.Tensor) -> Any:
        """Run a batch; the dynamic dimensions of all arguments have one size.

        Raises:
            RecompileError: An argument has another dtype, rank or size than the pieces were compiled for.
        """
        return self._by_size.get(self._check.size(args), self._general)(*args)
