# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, no-untyped-call"
# mypy: disallow-untyped-decorators=False
"""Launches that overlap (programmatic dependent launch): what a kernel must do that starts while others drain.

Needs triton, and a device from Hopper on.
"""

from __future__ import annotations

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_kernel_before():
    """Return when the results of the kernel before are there, and let the next one start.

    In this order: so whatever starts finds every kernel but the one before it complete. Kernels that Inductor makes
    count on that, and read what came earlier before they wait. Every program must call this, so that a complete kernel
    means that all before it are.
    """
    gdc_wait()
    gdc_launch_dependents()
