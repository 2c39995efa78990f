"""When two pieces are the same piece: a key over what they compute and for which inputs.

Knows graphs; knows nothing about who compiles them and where.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from typing import Any

import torch
from torch import fx

from workers.compile.plan import InputSpec
from workers.compile.split import op_name

#: Characters of a piece key.
KEY_LENGTH = 32


def piece_key(graph: fx.GraphModule) -> str:
    """A digest of the piece's code and of its inputs' dtypes, devices and layouts.

    The code is under canonical names already; sizes that vary are numbered in the order of their appearance, so the
    key is the same in every process.
    """
    text = json.dumps([graph.code, [dataclasses.astuple(spec) for spec in input_specs(graph)]])
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def input_specs(graph: fx.GraphModule) -> list[InputSpec]:
    """The piece's inputs as data."""
    symbols: dict[str, str] = {}
    return [_input_spec(node.meta["example_value"], symbols) for node in graph.graph.find_nodes(op="placeholder")]


def operation_counts(graph: fx.GraphModule) -> dict[str, int]:
    """How often each operation occurs in a piece, most frequent first; sizes and tuple items are left out."""
    names = [_operation(node) for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    return dict(Counter(name for name in names if name not in ("getitem", "size")).most_common())


def size_text(size: Any, symbols: dict[str, str]) -> int | str:
    """A size as data: a number, or an expression over numbered symbols."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        symbols.setdefault(str(symbol), f"n{len(symbols)}")
    return str(expression.subs({symbol: symbols[str(symbol)] for symbol in expression.free_symbols}))


def _input_spec(value: torch.Tensor, symbols: dict[str, str]) -> InputSpec:
    shape = tuple(size_text(size, symbols) for size in value.shape)
    stride = tuple(size_text(step, symbols) for step in value.stride())
    return InputSpec(str(value.dtype).removeprefix("torch."), value.device.type, shape, stride)


def _operation(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return op_name(node) or str(getattr(node.target, "__name__", node.target))
