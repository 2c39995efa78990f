"""Runs pieces that come from a store in a process of their own before this process loads them.

Code that crashes, hangs or computes nonsense must not take the engine with it. The check costs a process that imports
torch, and the compiler where the format needs it, so it is made once on each node for a set of builds; the verdict is
kept in the user's artifact folder. What cannot be decided (no memory left for a second process, say) is not held
against the pieces. Knows verdicts; the process is :mod:`workers.compile.check_process`'s, and what runs in it
:mod:`workers.compile.self_check_child`'s.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from workers.artifacts.digest import canonical_json, sha256
from workers.checkpoint.cache import artifacts_root
from workers.compile.check_process import check_process, not_needed
from workers.compile.errors import BuildFailedError, SelfCheckError
from workers.compile.piece_set import PieceSet

logger = logging.getLogger(__name__)

#: What the child says when it begins with code from the store; whatever ends it before that is not the code's fault.
LOADING = "loading"
PASSED = "passed"
FAILED = "failed"
#: Status with which the child ends if its machine kept it from trying a piece: no memory, no disk.
UNDECIDED = os.EX_TEMPFAIL
#: Before the digest of the build that it begins with.
TRYING = "trying "

#: Variables that an engine sets after the child may have begun: where its compiled kernels lie.
_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")

#: Modules that may define operators which pieces call, by the beginning of their names.
_OPERATOR_PACKAGES = ("workers.kernels", "workers.attention")


def check_on_node(pieces: PieceSet, sizes: Sequence[int | None], device: str, timeout_s: float) -> bool:
    """Run fetched pieces in a child process, unless this node has done so before.

    Args:
        device: Where they run.
        timeout_s: After this, code that is still running has failed; importing torch does not count.

    Returns:
        Whether the child ran.

    Raises:
        SelfCheckError: The code crashed, hung, or gave something else than it should.
        BuildFailedError: The child was killed from outside, so nothing is known and loading may end this process too.
    """
    verdict = _verdict_file(pieces, sizes)
    if verdict.exists():
        not_needed()
        return False
    try:
        has_passed = _try_pieces(pieces, sizes, device, timeout_s)
    except OSError as error:
        logger.warning("pieces could not be checked in a process of their own: %s", error)
        return False
    if has_passed:
        _keep(verdict)
    return True


def note_built_here(pieces: PieceSet, sizes: Sequence[int | None]) -> None:
    """Pieces that this process built, loaded and ran need no other process to try them on this node."""
    if pieces.bundle is not None:
        _keep(_verdict_file(pieces, sizes))


def _try_pieces(pieces: PieceSet, sizes: Sequence[int | None], device: str, timeout_s: float) -> bool:
    """Whether they passed; see :func:`_run_child`."""
    builds = pieces.builds(sizes)
    with tempfile.TemporaryDirectory(prefix="warmgraph-check-") as name:
        folder = Path(name)
        folder.chmod(0o700)
        for size, data in pieces.probes.items():
            (folder / probes_file(size)).write_bytes(data)
        work = []
        for (key, size), build in zip(_keys(pieces, sizes), builds, strict=True):
            (folder / build.sha256).write_bytes(pieces.blobs[build.sha256])
            work.append({"piece": key, "size": size, "file": build.sha256})
        modules = sorted(module for module in sys.modules if module.startswith(_OPERATOR_PACKAGES))
        caches = {name: os.environ[name] for name in _CACHES if name in os.environ}
        request = {
            "format": pieces.piece_format, "device": device, "work": work, "modules": modules, "environment": caches,
        }  # fmt: skip
        (folder / "request.json").write_text(json.dumps(request))
        return _run_child(folder, device, timeout_s)


def _verdict_file(pieces: PieceSet, sizes: Sequence[int | None]) -> Path:
    """A file that is there if these pieces have passed on this node."""
    assert pieces.bundle is not None
    digests = [build.sha256 for build in pieces.builds(sizes)] + [sha256(data) for data in pieces.probes.values()]
    return artifacts_root() / "verdicts" / sha256(canonical_json([pieces.bundle.key, sorted(digests)]))


def _keep(verdict: Path) -> None:
    try:
        verdict.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        verdict.touch(mode=0o600)
    except OSError as error:
        logger.warning("the verdict on pieces could not be kept, and they will be tried again: %s", error)


def _keys(pieces: PieceSet, sizes: Sequence[int | None]) -> list[tuple[str, int | None]]:
    """In the order of :meth:`PieceSet.builds`."""
    return [(key, size) for size in sizes for key in pieces.plan.pieces]


def probes_file(size: int | None) -> str:
    """Where the child finds what pieces for this batch size should give."""
    return f"probes-{size or 'any'}.json"


def _run_child(folder: Path, device: str, timeout_s: float) -> bool:
    """Whether the pieces passed; False if the child could not tell."""
    with check_process(device) as process:
        status = process.run(folder, timeout_s, lambda: LOADING in _states(folder))
        output_text = process.output()
    states = _states(folder)
    last = states[-1] if states else ""
    if last == PASSED:
        return True
    if LOADING not in states or status == UNDECIDED:
        logger.warning("pieces could not be checked in a process of their own: %s", _tail(output_text))
        return False
    if status == -signal.SIGKILL:
        raise BuildFailedError(
            "The process that tried the pieces was killed, as a machine short of memory does; they are not loaded."
        )
    culprits = tuple(state.removeprefix(TRYING) for state in states if state.startswith(TRYING))[-1:]
    if last.startswith(FAILED):
        raise SelfCheckError(last.removeprefix(f"{FAILED}: "), culprits)
    how = f"did not finish within {timeout_s:g} s" if status is None else f"ended with status {status}"
    raise SelfCheckError(f"The process that tried the pieces {how}. {_tail(output_text)}", culprits)


def _states(folder: Path) -> list[str]:
    """How far the child says it has come."""
    path = folder / "states"
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _tail(text: str) -> str:
    return " ".join(text.splitlines()[-3:])[-600:]
