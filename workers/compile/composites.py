"""Functions that stay one node of a traced graph, so that passes see what the model means and not how it is written.

Before a compiler gets a piece, whatever composites are left are replaced by the operations they consist of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from workers.kernels import reference

#: Kept whole while tracing. On a CPU the model calls operators instead, which are single nodes anyway.
COMPOSITES: tuple[Callable[..., Any], ...] = (
    reference.rms_norm,
    reference.add_rms_norm,
    reference.silu_and_mul,
    reference.apply_rope,
)


def replace_call(node: fx.Node, function: Callable[..., Any], *args: Any) -> None:
    """Put a call of ``function``, which gives what ``node`` gives, in its place."""
    graph = node.graph
    with graph.inserting_before(node):
        new = graph.call_function(function, args)
    set_example_value(new)
    node.replace_all_uses_with(new)
    for user in new.users:
        set_example_value(user)
    graph.erase_node(node)


def set_example_value(node: fx.Node) -> None:
    """Work out what a call gives from the example values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["example_value"])
    tensors = [value for value in itertools.chain(args, kwargs.values()) if isinstance(value, torch.Tensor)]
    mode: Any = getattr(next(iter(tensors), None), "fake_mode", None)
    assert callable(node.target)
    if mode is None:
        node.meta["example_value"] = node.target(*args, **kwargs)
        return
    with mode, torch.no_grad():
        node.meta["example_value"] = node.target(*args, **kwargs)


def lower(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """A piece as ATen operators, composites included, with example values.

    Args:
        inputs: Fake tensors of one mode.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx

    fake_mode: Any = inputs[0].fake_mode  # type: ignore[attr-defined]  # of fake tensors
    with fake_mode, enable_python_dispatcher(), torch.no_grad():
        lowered = make_fx(function)(*inputs)
    for node in lowered.graph.nodes:
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    return lowered
