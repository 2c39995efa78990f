"""When this process began, on the monotonic clock. Import it first: the time of its import is part of the answer."""

from __future__ import annotations

import os
import time
from pathlib import Path

#: When Python had come as far as importing warmgraph.
FIRST_IMPORT_S = time.monotonic()


def process_started_s() -> float:
    """When the process was started; where the system does not say, when warmgraph was imported."""
    try:
        text = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        boottime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return FIRST_IMPORT_S
    # The second field is the command in parentheses and may hold anything.
    started_s = int(text.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return min(time.monotonic() - (boottime_s - started_s), FIRST_IMPORT_S)
