"""The manifest of an imported checkpoint: where it came from and the size and digest of each of its files.

It is the last file written, so a folder that has one was finished. Knows nothing about model formats.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from cluster.models.digest import sha256_of
from cluster.models.progress import Progress, Stage, silent

MANIFEST_FILE = "warmgraph-manifest.json"

#: Raised whenever the importer would write something else for the same source: older imports are then redone.
FORMAT = 1


@dataclasses.dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and hex SHA-256 of one file."""

    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """What an import wrote.

    Attributes:
        source: File name of the GGUF file or wheel.
        source_sha256: Its digest.
        files: By name inside the folder.
        format: ``FORMAT`` of the importer that wrote it.
    """

    source: str
    source_sha256: str
    files: dict[str, FileRecord]
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        """Total size of the files."""
        return sum(record.num_bytes for record in self.files.values())


def write_manifest(folder: Path, source: str, source_sha256: str, progress: Progress = silent) -> Manifest:
    """Read every file of a folder back from disk, and record what is there."""
    paths = sorted(folder.iterdir())
    counter = _Counter(progress, sum(path.stat().st_size for path in paths))
    files = {path.name: FileRecord(path.stat().st_size, sha256_of(path, counter.add)) for path in paths}
    manifest = Manifest(source, source_sha256, files)
    content = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(content, encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if there is none, it is damaged, or it has another format."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return None
        files = {str(name): FileRecord(**record) for name, record in content["files"].items()}
        return Manifest(content["source"], content["source_sha256"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def find_damage(folder: Path, manifest: Manifest, *, full: bool, progress: Progress = silent) -> list[str]:
    """What is wrong with a folder, one sentence per file; empty if nothing is.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        full: Hash every file; otherwise only sizes are compared, which takes no time.
        progress: Told while hashing.
    """
    damage = []
    counter = _Counter(progress, manifest.num_bytes)
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            damage.append(f"{name} is missing.")
        elif path.stat().st_size != record.num_bytes:
            damage.append(f"{name} has {path.stat().st_size} bytes where {record.num_bytes} were written.")
        elif full and sha256_of(path, counter.add) != record.sha256:
            damage.append(f"{name} is not what was written: its digest differs.")
    return damage


class _Counter:
    """Turns per-file steps into progress over all files."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._progress(Stage.VERIFY, self._done, self._total)
