"""Tensors inside nested containers: the shapes that a captured callable may take and return.

Knows tuples, named tuples, lists, dicts and dataclasses; knows nothing about graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch


def map_tensors(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with ``function`` applied to every tensor in tuples, lists and dicts.

    Other values, dataclasses included, are kept as they are.
    """
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        items = [map_tensors(item, function) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [map_tensors(item, function) for item in tree]
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    return tree


def iter_leaves(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """Every value that is not a container, with its path: ``name[0]['key'].field``."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from iter_leaves(f"{name}[{key!r}]", value)
    elif isinstance(tree, tuple | list):
        fields = getattr(tree, "_fields", None)
        for index, value in enumerate(tree):
            yield from iter_leaves(f"{name}.{fields[index]}" if fields else f"{name}[{index}]", value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from iter_leaves(f"{name}.{field.name}", getattr(tree, field.name))
    else:
        yield name, tree


def check_outputs(tree: Any) -> None:
    """Refuse outputs in which tensors could hide from :func:`map_tensors`.

    Raises:
        TypeError: An output is neither a tensor, a number, a string nor None, nor a container of those.
    """
    for name, leaf in iter_leaves("output", tree):
        if not isinstance(leaf, torch.Tensor | int | float | str | None):
            raise TypeError(f"a captured callable returned a {type(leaf).__name__} as {name}; return tensors")
    if any(dataclasses.is_dataclass(item) for item in _containers(tree)):
        raise TypeError("a captured callable returned a dataclass; return a tuple or a dict of tensors")


def _containers(tree: Any) -> Iterator[Any]:
    yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    for child in children:
        yield from _containers(child)
