"""The process that builds in the background: at the lowest priority, and not longer than whoever started it.

``python -m workers.compile.build_worker FOLDER`` ends, with its compilers, when its standard input does. Knows a
private folder with a request, a plan, and blobs; :mod:`workers.compile.background` fills it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from workers.compile.plan import Plan

#: Names in the folder: what to build, the plan without and with it, and the blobs that were built.
REQUEST, PLAN, RESULT, BLOBS = "request.json", "plan.json", "result.json", "blobs"

_LOWEST_PRIORITY = 19


def main(folder: Path) -> None:
    """Build what the folder's request asks for, beside whatever else the machine has to do."""
    os.nice(_LOWEST_PRIORITY - os.nice(0))
    threading.Thread(target=_die_with_parent, name="die-with-parent", daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Not before: importing torch takes seconds, and they are in no hurry either.
    from workers.compile.build_more import build_more

    request = json.loads((folder / REQUEST).read_text())
    plan = Plan.from_json((folder / PLAN).read_bytes())
    sources = {key: (folder / BLOBS / key).read_bytes() for key in plan.pieces}
    for digest, data in build_more(plan, sources, request["piece_format"], request["sizes"]).items():
        (folder / BLOBS / digest).write_bytes(data)
    (folder / RESULT).write_text(plan.to_json())


def _die_with_parent() -> None:
    # Not through sys.stdin, whose lock the interpreter wants back when the work is done.
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
