"""The passes that every model gets, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workers.compile.passes.manager import PassManager
from workers.compile.passes.noop import NoopElimination
from workers.compile.passes.qk_rope import QkRope
from workers.compile.passes.rope_kv_write import RopeKvWrite


def standard_passes(switches: Mapping[str, bool] | None = None, splitting_ops: Sequence[str] = ()) -> PassManager:
    """A manager for the standard passes.

    Args:
        switches: Turns passes on or off by name; those not named are on.
        splitting_ops: Of the attention backend, which may want more in its op than attention.
    """
    # What attention does not rotate itself, QkRope makes one kernel of.
    return PassManager([NoopElimination(), RopeKvWrite(splitting_ops), QkRope()], switches)
