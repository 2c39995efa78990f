"""Turns a plan and loaded pieces into one flat Python function with the weights bound.

A step costs what its calls cost: no module tree, no dictionary, no guard. Knows plans and callables, and imports no
compiler.

Shape suffixes: none; tensors only pass through.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from workers.compile.plan import InputSpec, OpStep, PieceStep, Plan, Value

#: Runs a stitched model: tensors in the order of the plan's arguments.
Runner = Callable[..., Any]


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedPiece:
    """A piece, ready to run.

    Attributes:
        call: Takes its inputs, and returns a sequence of results.
        takes_list: Whether it wants the inputs as one list instead of as arguments.
    """

    call: Callable[..., Sequence[torch.Tensor]]
    takes_list: bool = False

    def as_function(self) -> Callable[..., Sequence[torch.Tensor]]:
        """A callable that takes inputs as arguments."""
        if not self.takes_list:
            return self.call
        call = self.call

        def piece(*args: torch.Tensor) -> Sequence[torch.Tensor]:
            return call(list(args))

        return piece


@dataclasses.dataclass(frozen=True, slots=True)
class PieceInfo:
    """Which call of a piece a wrapper is for.

    Attributes:
        index: Position among the piece calls of one forward pass.
        num_pieces: How many there are.
        key: Of the piece; shared by calls of equal pieces.
        size: The only batch size that it is compiled for, or None.
    """

    index: int
    num_pieces: int
    key: str
    size: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether the pass begins with it."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the pass ends with it."""
        return self.index == self.num_pieces - 1


#: Puts something, a graph wrapper say, around one call of a piece.
WrapPiece = Callable[[Callable[..., Any], PieceInfo], Callable[..., Any]]

#: Takes what the last piece reads of the batch, ``[T, ...]`` each, and gives the rows to go on with.
KeepRows = Callable[..., Sequence[torch.Tensor]]


def stitch(
    plan: Plan,
    pieces: Mapping[str, LoadedPiece],
    weights: Mapping[str, torch.Tensor],
    *,
    size: int | None = None,
    wrap_piece: WrapPiece | None = None,
    keep_rows: KeepRows | None = None,
) -> Runner:
    """Make the function that runs the plan.

    Args:
        pieces: By key.
        weights: By name; held by the function.
        size: The only batch size that the pieces are compiled for, for ``wrap_piece``.
        wrap_piece: Called once for every piece call, in order.
        keep_rows: Called in every pass, before the piece behind the last split op. Only for pieces of every size, and
            only where that piece computes every row from the same row of its inputs.
    """
    assert keep_rows is None or size is None
    names: dict[str, Any] = {f"w{index}": weights[spec.name] for index, spec in enumerate(plan.weights)}
    calls = plan.piece_calls()
    takes_list: list[bool] = []
    for index, key in enumerate(calls):
        piece = pieces[key]
        wrap = wrap_piece is not None
        takes_list.append(piece.takes_list and not wrap)
        if wrap_piece is None:
            names[f"piece{index}"] = piece.call
        else:
            names[f"piece{index}"] = wrap_piece(piece.as_function(), PieceInfo(index, len(calls), key, size))
    for index, op in enumerate(_ops(plan)):
        namespace, _, name = op.partition("::")
        names[f"op{index}"] = getattr(getattr(torch.ops, namespace), name).default
    if keep_rows is not None:
        names["keep_rows"] = keep_rows
    exec(compile(source(plan, takes_list, keeps_rows=keep_rows is not None), "<plan>", "exec"), names)
    runner: Runner = names["forward"]
    return runner


def source(plan: Plan, takes_list: Sequence[bool] | None = None, *, keeps_rows: bool = False) -> str:
    """The function's Python text.

    Args:
        takes_list: Of every piece call, whether it wants its inputs as a list.
        keeps_rows: Whether it calls ``keep_rows``.
    """
    kept = _read_behind_last_op(plan) if keeps_rows else []
    ops = {op: index for index, op in enumerate(_ops(plan))}
    lines = [f"def forward({', '.join(f'a{index}' for index in range(len(plan.arguments)))}):"]
    num_calls = 0
    for step, dead in zip(plan.steps, _dead_after(plan), strict=True):
        if isinstance(step, PieceStep):
            if kept and step is plan.steps[-1]:
                lines.append(f"    {_targets(kept)}keep_rows({', '.join(kept)})")
            args = ", ".join(_text(arg) for arg in step.args)
            if takes_list is not None and takes_list[num_calls]:
                args = f"[{args}]"
            lines.append(f"    {_targets(step.results)}piece{num_calls}({args})")
            num_calls += 1
        else:
            args = ", ".join([*map(_text, step.args), *(f"{key}={_text(arg)}" for key, arg in step.kwargs.items())])
            target = f"{step.result} = " if step.result else ""
            lines.append(f"    {target}op{ops[step.op]}({args})")
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    results = ", ".join(_text(result) for result in plan.results)
    lines.append(f"    return ({results},)" if plan.returns_tuple else f"    return {results}")
    return "\n".join(lines) + "\n"


def _targets(results: Sequence[str]) -> str:
    return f"{', '.join(results)}, = " if results else ""


def _read_behind_last_op(plan: Plan) -> list[str]:
    """What the plan's last piece reads of the batch, if that is rows behind a split op; else nothing."""
    last = plan.steps[-1]
    if not isinstance(last, PieceStep) or len(plan.steps) < 2 or not isinstance(plan.steps[-2], OpStep):
        return []
    inputs = zip(last.args, plan.pieces[last.piece].inputs, strict=True)
    varying = [(arg, spec) for arg, spec in inputs if any(isinstance(size, str) for size in spec.shape)]
    rows = {spec.shape[0] for _, spec in varying}
    if len(rows) != 1 or not all(_is_dense_rows(spec) for _, spec in varying):
        return []
    return list(dict.fromkeys(_text(arg) for arg, _ in varying))


def _is_dense_rows(spec: InputSpec) -> bool:
    """Whether dimension 0 alone varies, as a size of its own, and chosen rows have the strides that all have."""
    first, *others = spec.shape
    sizes = [size for size in others if isinstance(size, int)]
    is_rows = isinstance(first, str) and first.isidentifier() and len(sizes) == len(others)
    return is_rows and spec.stride == tuple(math.prod(sizes[index:]) for index in range(len(spec.shape)))


def _ops(plan: Plan) -> list[str]:
    return list(dict.fromkeys(step.op for step in plan.steps if isinstance(step, OpStep)))


def _text(value: Value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    return repr(value["const"])


def _names_in(value: Value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _names_in(item)


def _values_of(step: PieceStep | OpStep) -> list[Value]:
    """What a step takes and gives."""
    if isinstance(step, PieceStep):
        return [*step.args, *step.results]
    return [*step.args, *step.kwargs.values(), *([step.result] if step.result else [])]


def _dead_after(plan: Plan) -> list[list[str]]:
    """Results that nobody needs after each step, so that their memory is free for the next one."""
    last_use: dict[str, int] = {}
    for index, step in enumerate(plan.steps):
        for value in _values_of(step):
            last_use.update((name, index) for name in _names_in(value))
    for result in plan.results:
        last_use.update((name, len(plan.steps)) for name in _names_in(result))
    dead: list[list[str]] = [[] for _ in plan.steps]
    for name, index in last_use.items():
        if name.startswith("v") and index < len(plan.steps):
            dead[index].append(name)
    return dead
