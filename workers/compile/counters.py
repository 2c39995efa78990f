"""What the compile layer has done in this process, as numbers."""

from __future__ import annotations

import dataclasses
import sys
from typing import Self


@dataclasses.dataclass(slots=True)
class CompileCounters:
    """Of one engine, whatever forms of its model it makes.

    Attributes:
        num_traces: Dynamo traces.
        num_compiled: Programs or pieces that went through a compiler.
        num_shared: Pieces that were taken over from bundles of other models instead of compiled.
        num_loaded: Pieces loaded.
        num_graph_breaks: Traces that failed because the model is not one graph, at the start or while serving.
        num_recompiles_refused: Batches that would have needed a compilation after start, and got an error.
    """

    num_traces: int = 0
    num_compiled: int = 0
    num_shared: int = 0
    num_loaded: int = 0
    num_graph_breaks: int = 0
    num_recompiles_refused: int = 0

    def snapshot(self) -> Self:
        """A copy that stays as it is."""
        return dataclasses.replace(self)


def compiler_activity() -> dict[str, int]:
    """What PyTorch's own compilers have done in this process, by their own counters; zero where not even imported.

    Returns:
        ``dynamo_graphs`` traced, ``aot_graphs`` that AOTAutograd dealt with, ``inductor_graphs`` lowered to code.
    """
    activity = {"dynamo_graphs": 0, "aot_graphs": 0, "inductor_graphs": 0}
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is not None:
        activity["dynamo_graphs"] = int(dynamo.counters["stats"]["unique_graphs"])
        activity["aot_graphs"] = int(dynamo.counters["aot_autograd"]["total"])
        activity["inductor_graphs"] = len(dynamo.compilation_time_metrics.get("GraphLowering.run", ()))
    return activity
