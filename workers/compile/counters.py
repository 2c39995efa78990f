"""What the compile layer has done in this process, as numbers."""

from __future__ import annotations

import dataclasses
import sys


@dataclasses.dataclass(slots=True)
class CompileCounters:
    """Of one compiled model.

    Attributes:
        num_traces: Dynamo traces.
        num_compiled: Programs or pieces that went through a compiler.
        num_loaded: Pieces loaded from a store.
        num_recompiles_refused: Batches that would have needed a compilation after start, and got an error.
    """

    num_traces: int = 0
    num_compiled: int = 0
    num_loaded: int = 0
    num_recompiles_refused: int = 0


def compiler_activity() -> dict[str, int]:
    """What PyTorch's own compilers have done in this process, by their own counters; zero where not even imported.

    Returns:
        ``dynamo_frames``, ``inductor_graphs`` (lowered by Inductor), ``triton_compilations``.
    """
    activity = {"dynamo_frames": 0, "inductor_graphs": 0, "triton_compilations": 0}
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is not None:
        activity["dynamo_frames"] = int(dynamo.counters["stats"]["unique_graphs"])
    metrics = sys.modules.get("torch._inductor.metrics")
    if metrics is not None:
        activity["inductor_graphs"] = int(metrics.generated_kernel_count + metrics.generated_cpp_vec_kernel_count)
    return activity
