"""Builds more formats of a plan from its pieces' sources: no model, no trace and no weights are needed.

Knows plans and formats; nothing of where either comes from, and of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

# Defines the operators that sources call.
import workers.kernels.linear  # noqa: F401
from workers.compile import torch_compat
from workers.compile.compiler import build_pieces
from workers.compile.environment import environment_factors, source_digests
from workers.compile.errors import PlanMismatchError
from workers.compile.formats.base import make_format
from workers.compile.plan import Plan


def build_more(
    plan: Plan, sources: Mapping[str, bytes], piece_format: str, sizes: Sequence[int | None]
) -> dict[str, bytes]:
    """Compile the plan's pieces in another format, with the Inductor options among the plan's factors.

    The builds are added to the plan; those that it has already are kept. On a CPU the number of threads of this process
    becomes that of the plan, which is part of compiled code.

    Args:
        sources: What each piece computes, by its key; code, so verified.
        sizes: Values of the dynamic dimension; None stands for every size.

    Returns:
        The bytes of what was built, by digest.

    Raises:
        PlanMismatchError: The plan is of another machine, release or source.
    """
    _check_factors(plan)
    options, size_options = plan.factors["inductor"], plan.factors["inductor_for_sizes"]
    if piece_format != "fx":
        torch_compat.check_inductor_options([*options, *(size_options or ())])
    blobs: dict[str, bytes] = {}
    build_pieces(plan, sources, make_format(piece_format, options, size_options), blobs, sizes)
    return blobs


def _check_factors(plan: Plan) -> None:
    """Compiled here must mean compiled there."""
    environment = plan.factors["environment"]
    if "num_threads" in environment:
        torch.set_num_threads(environment["num_threads"])
    device = torch.device(next(iter(plan.pieces.values())).inputs[0].device)
    for name, value in environment_factors(device).items():
        if environment.get(name) != value:
            raise PlanMismatchError(f"The plan was made for {name} {environment.get(name)}; here it is {value}.")
    if plan.factors["sources"] != source_digests():
        raise PlanMismatchError("The plan was made by other sources than are installed here now.")
