"""The passes that every model gets, in their order."""

from __future__ import annotations

from collections.abc import Mapping

from workers.compile.passes.manager import PassManager
from workers.compile.passes.noop import NoopElimination
from workers.compile.passes.qk_rope import QkRope
from workers.compile.passes.residual_norm import ResidualNorm


def standard_passes(switches: Mapping[str, bool] | None = None) -> PassManager:
    """A manager for the standard passes.

    Args:
        switches: Turns passes on or off by name; those not named are on.
    """
    return PassManager([NoopElimination(), QkRope(), ResidualNorm()], switches)
