"""Cuts a traced graph at its split ops into pieces that say everything they need.

Knows graphs and nothing of what compiles them. A piece takes tensors only: a size is read off one of them, so that a
captured graph around a piece sees nothing but memory, and every piece format can take it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from workers.compile.errors import CompileError

#: A value of the stitched graph, or a constant, or a list of either: what a call takes.
Argument = Any


@dataclasses.dataclass(slots=True)
class Region:
    """A run of operations between two split ops.

    Attributes:
        graph: The operations, under canonical names: equal regions of two layers print the same code. Placeholders
            carry fake values as ``meta["example_value"]``; the output is always a tuple.
        inputs: Values of the full graph that it takes, in the order of its placeholders.
        outputs: Values of the full graph that it gives.
    """

    graph: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]


@dataclasses.dataclass(slots=True)
class SplitCall:
    """A call of a split op; it stays outside of every piece.

    Attributes:
        op: Qualified name, ``namespace::name``.
        node: The call in the full graph.
    """

    op: str
    node: fx.Node


def op_name(node: fx.Node) -> str:
    """``namespace::name`` of the operator that a node calls, without overload; empty if it is not an operator."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name)
    return ""


def split(graph: fx.Graph, splitting_ops: Collection[str]) -> list[Region | SplitCall]:
    """Cut ``graph`` at every call of one of ``splitting_ops``.

    Returns:
        Regions and split calls in execution order; empty regions are left out.

    Raises:
        CompileError: The graph holds a tensor constant, which no plan could bind by name, or a split op returns a
            tuple.
    """
    part_of = _partition(graph, splitting_ops)
    members: dict[int, list[fx.Node]] = {}
    for node, part in part_of.items():
        members.setdefault(part, []).append(node)
    parts: list[Region | SplitCall] = []
    for _, nodes in sorted(members.items()):
        name = op_name(nodes[0])
        if name in splitting_ops:
            if len(nodes) > 1:
                raise CompileError(f"{name} returns several tensors, so the graph cannot be split at it.")
            parts.append(SplitCall(name, nodes[0]))
        else:
            parts.append(_region(nodes))
    return parts


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that a node stands for, if it stands for a tensor."""
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def _partition(graph: fx.Graph, splitting_ops: Collection[str]) -> dict[fx.Node, int]:
    """Odd numbers are split ops, even numbers the regions between them."""
    part_of: dict[fx.Node, int] = {}
    current = 0
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            raise CompileError(f"The graph holds the constant {node.target}; register it as a buffer of the model.")
        if op_name(node) in splitting_ops:
            part_of[node] = current + 1
            current += 2
        elif node.target is operator.getitem and node.args[0] in part_of:
            # Tuples stay inside the piece that makes them.
            part_of[node] = part_of[node.args[0]]
        else:
            part_of[node] = current
    return part_of


def _region(nodes: Sequence[fx.Node]) -> Region:
    inside = set(nodes)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    inputs = [node for node in _external_values(nodes, inside) if not _is_size(node)]
    copier = _Copier(inputs)
    for node in nodes:
        copier.copy(node)
    return Region(copier.finish(outputs), inputs, outputs)


def _external_values(nodes: Sequence[fx.Node], inside: Collection[fx.Node]) -> Iterator[fx.Node]:
    """What the region uses and does not make, in the order of first use."""
    seen: set[fx.Node] = set()
    for node in nodes:
        for value in node.all_input_nodes:
            if value not in inside and value not in seen:
                seen.add(value)
                yield value


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymInt)


class _Copier:
    """Copies nodes into a graph of their own under canonical names."""

    def __init__(self, inputs: Sequence[fx.Node]) -> None:
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[Any, fx.Node] = {}
        self._num_nodes = 0
        for index, value in enumerate(inputs):
            placeholder = self._graph.placeholder(f"p{index}")
            placeholder.meta["example_value"] = value.meta["example_value"]
            self._copies[value] = placeholder

    def copy(self, node: fx.Node) -> None:
        args = fx.map_arg(node.args, self._value)
        kwargs = fx.map_arg(node.kwargs, self._value)
        copy = self._new(node.op, node.target, args, kwargs)
        if "example_value" in node.meta:
            copy.meta["example_value"] = node.meta["example_value"]
        self._copies[node] = copy

    def finish(self, outputs: Sequence[fx.Node]) -> fx.GraphModule:
        self._graph.output(tuple(self._value(node) for node in outputs))
        self._graph.lint()
        return fx.GraphModule(torch.nn.Module(), self._graph)

    def _value(self, node: fx.Node) -> fx.Node:
        return self._copies[node] if node in self._copies else self._size(node)

    def _size(self, node: fx.Node) -> fx.Node:
        """A size from outside, read off the first input that has it."""
        wanted = node.meta["example_value"].node.expr
        if wanted not in self._sizes:
            self._sizes[wanted] = self._read_size(wanted, node)
        return self._sizes[wanted]

    def _read_size(self, wanted: Any, node: fx.Node) -> fx.Node:
        for placeholder in self._graph.find_nodes(op="placeholder"):
            for dim, size in enumerate(placeholder.meta["example_value"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == wanted:
                    read = self._new("call_method", "size", (placeholder, dim), {})
                    read.meta["example_value"] = size
                    return read
        raise CompileError(f"A piece needs the size {node.name}, which none of its inputs has.")

    def _new(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self._graph.create_node(op, target, args, kwargs, name=f"n{self._num_nodes}")
        self._num_nodes += 1
        return node
