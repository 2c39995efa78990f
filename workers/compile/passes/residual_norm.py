"""Keeps the residual's sum out of the matrix product before it, so that it is fused with the norm after it."""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from workers.compile import fused
from workers.compile.composites import replace_call
from workers.compile.passes.manager import GraphPass
from workers.kernels import reference


class ResidualNorm(GraphPass):
    """See the module."""

    name: ClassVar[str] = "residual_norm"

    def run(self, graph: fx.Graph) -> int:
        """Counts the norms: two of every layer."""
        nodes = graph.find_nodes(op="call_function", target=reference.add_rms_norm)
        for node in nodes:
            assert not node.kwargs
            replace_call(node, fused.add_rms_norm, *node.args)
        return len(nodes)
