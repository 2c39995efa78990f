"""The process that tries pieces: loads each, runs it on fixed inputs, compares. Started by workers.compile.self_check.

Is told the device as its argument, and then on its standard input the folder with ``request.json``, beside which it
writes to ``states`` how far it has come. Ends if nobody tells it any more.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch

from workers.compile.formats.base import make_format
from workers.compile.probes import Probe, read_probes, try_piece
from workers.compile.self_check import FAILED, LOADING, PASSED, TRYING, UNDECIDED, probes_file
from workers.compile.transient import is_transient


def main(folder: Path) -> None:
    """Try every piece of the request."""
    request = json.loads((folder / "request.json").read_text())
    os.environ.update(request["environment"])
    for module in request["modules"]:
        importlib.import_module(module)
    device = torch.device(request["device"])
    torch.empty(1, device=device)
    probes = _probes(folder, {item["size"] for item in request["work"]})
    _say(folder, LOADING)
    piece_format, is_undecided = make_format(request["format"]), False
    for item in request["work"]:
        _say(folder, f"{TRYING}{item['file']}")
        try:
            piece = piece_format.load((folder / item["file"]).read_bytes())
            problem = try_piece(piece, probes.get(item["size"], {}).get(item["piece"]), device)
        except Exception as error:  # noqa: BLE001  # the code may raise anything
            problem = None if is_transient(error) else f"{type(error).__name__}: {error}"
            is_undecided |= problem is None
        if problem is not None:
            _say(folder, f"{FAILED}: Piece {item['piece'][:8]}: {' '.join(problem.split())[:500]}.")
            sys.exit(1)
    if is_undecided:
        os._exit(UNDECIDED)
    _say(folder, PASSED)
    # Code from the store has run; nothing of it gets to say anything while the process ends.
    os._exit(0)


def _probes(folder: Path, sizes: set[int | None]) -> dict[int | None, dict[str, Probe]]:
    files = {size: folder / probes_file(size) for size in sizes}
    return {size: read_probes(path.read_bytes()) for size, path in files.items() if path.exists()}


def _say(folder: Path, state: str) -> None:
    try:
        with (folder / "states").open("a") as file:
            file.write(state + "\n")
    except OSError:
        os._exit(UNDECIDED)


def _bring_up(device: torch.device) -> None:
    if device.type == "cpu" or torch.cuda.is_available():
        torch.empty(1, device=device)


if __name__ == "__main__":
    _bring_up(torch.device(sys.argv[1]))
    if line := sys.stdin.readline().rstrip("\n"):
        main(Path(line))
