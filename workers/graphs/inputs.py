"""What a captured graph saw as its inputs, to compare with what a later call brings.

A graph reads the memory that its capture read and bakes everything else in, so a moved tensor or a changed number
would silently be ignored. Knows nothing about graphs themselves.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from workers.graphs.trees import iter_leaves


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInput:
    """One tensor as a graph sees it."""

    data_ptr: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorInput:
        """Describe ``tensor``."""
        return cls(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


#: A tensor's description, or a number, string or None, which a graph bakes in.
InputLeaf = TensorInput | int | float | str | None


def describe_inputs(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, InputLeaf]:
    """Every tensor and constant of a call, nested containers included, by the path of its argument.

    Args:
        names: Names of the positional parameters; further arguments are called ``args[i]``.
    """
    leaves: dict[str, InputLeaf] = {}
    for index, value in enumerate(args):
        leaves.update(_leaves(names[index] if index < len(names) else f"args[{index}]", value))
    for name, value in kwargs.items():
        leaves.update(_leaves(name, value))
    return leaves


def positional_names(function: Callable[..., Any]) -> list[str]:
    """Names of a callable's positional parameters; fewer, or none, where it has no signature."""
    target = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def find_mismatch(
    captured: Mapping[str, InputLeaf], current: Mapping[str, InputLeaf], *, with_addresses: bool
) -> str | None:
    """The first input that the graph would misread, in words, or None.

    Args:
        with_addresses: Compare addresses and constants too; otherwise only the tensors' shapes, strides and dtypes.
    """
    for name in [*captured, *(name for name in current if name not in captured)]:
        if name not in current or name not in captured:
            where = "was given at capture and is missing now" if name in captured else "was not given at capture"
            return f"input {name!r} {where}"
        problem = _leaf_mismatch(captured[name], current[name], with_addresses)
        if problem is not None:
            return f"input {name!r} {problem}"
    return None


def _leaf_mismatch(was: InputLeaf, now: InputLeaf, with_addresses: bool) -> str | None:
    if isinstance(was, TensorInput) and isinstance(now, TensorInput):
        for field in ("shape", "dtype", "stride"):
            old, new = getattr(was, field), getattr(now, field)
            if old != new:
                return f"has {field} {new}, and was captured with {field} {old}"
        if with_addresses and was.data_ptr != now.data_ptr:
            return (
                f"moved from {was.data_ptr:#x} at capture to {now.data_ptr:#x}; "
                "write it into the persistent buffer that the graph reads"
            )
        return None
    if isinstance(was, TensorInput) or isinstance(now, TensorInput):
        return "is a tensor in only one of capture and this call"
    if with_addresses and (type(was) is not type(now) or was != now):
        return f"is {now!r}, and the graph has {was!r} baked in"
    return None


def _leaves(name: str, value: Any) -> dict[str, InputLeaf]:
    leaves: dict[str, InputLeaf] = {}
    for path, leaf in iter_leaves(name, value):
        if isinstance(leaf, torch.Tensor):
            leaves[path] = TensorInput.of(leaf)
        elif isinstance(leaf, int | float | str | None):
            leaves[path] = leaf
    return leaves
