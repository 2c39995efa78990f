"""Kernels that Triton compiles outside of pieces (attention, cache writes, sampling), kept with the bundle.

Triton keeps what it compiled as files in a folder: kernels, and the small extension modules that launch them, for which
it calls a C compiler. An engine gives it a folder of its own, named after the bundle's
key, so that everything in it belongs to this configuration, whichever process of the node compiled it. A new node
unpacks what others published before the first kernel is launched; once nothing else is to be done, what was compiled
since is published. Knows files and bundles; imports no Triton.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
import tempfile
import threading
from pathlib import Path

from workers.artifacts.archives import pack, unpack
from workers.artifacts.errors import ArtifactError
from workers.artifacts.key import BundleKey
from workers.artifacts.library import Addition, ArtifactLibrary
from workers.artifacts.manifest import Kind
from workers.checkpoint.cache import artifacts_root

logger = logging.getLogger(__name__)

#: Name of the entry.
NAME = "kernels"

_VARIABLE = "TRITON_CACHE_DIR"

#: Files that describe a kernel name the others by absolute path; this stands for the folder while they travel.
_FOLDER = b"{WARMGRAPH_TRITON_FOLDER}"
_GROUP_PREFIX = "__grp__"

#: How the names of extension modules end that this Python can import; one that it cannot load, Triton builds again.
_MODULE_SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")


class TritonKernels:
    """The kernels of one engine; see the module.

    Args:
        library: Where others' are, and where these go.
        key: Of the engine's bundle; without a bundle nothing is published.
        root: Of the folders, on this node.
    """

    def __init__(self, library: ArtifactLibrary, key: BundleKey, root: Path | None = None) -> None:
        self.folder = (root or artifacts_root() / "triton") / key.digest[:32]
        self._library = library
        self._key = key
        self._published: frozenset[str] = frozenset()
        self._publishing: threading.Thread | None = None

    def restore(self) -> int:
        """Point Triton at the folder, and put there what was published; returns the number of kernels' folders added.

        Where ``TRITON_CACHE_DIR`` is set already, by an operator or another engine, it stays, and nothing is restored.
        """
        if os.environ.get(_VARIABLE, str(self.folder)) != str(self.folder):
            return 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            logger.warning("Triton's kernels are not kept: %s", error)
            return 0
        os.environ[_VARIABLE] = str(self.folder)
        num_added = 0
        bundle = self._library.peek(self._key)
        entry = bundle.first(Kind.TRITON, NAME) if bundle is not None else None
        if bundle is not None and entry is not None:
            try:
                num_added = self._unpack(self._library.read(bundle, entry))
            except (ArtifactError, OSError) as error:
                logger.warning("Triton's kernels are compiled again: %s", error)
        return num_added

    def publish_new(self) -> threading.Thread | None:
        """Publish, on a thread, if the node has kernels that nobody published; the thread, if there is one."""
        compiled = self._compiled() if os.environ.get(_VARIABLE) == str(self.folder) else frozenset()
        if compiled <= self._published:
            return None
        self._published = compiled
        self._publishing = threading.Thread(target=self.publish, name="publish-triton-kernels", daemon=True)
        self._publishing.start()
        return self._publishing

    def wait_published(self) -> None:
        """Return when :meth:`publish_new`'s thread is done."""
        if self._publishing is not None:
            self._publishing.join()

    def publish(self) -> bool:
        """Put the folder beside the pieces; whether the library took it."""
        bundle = self._library.peek(self._key)
        if bundle is None:
            return False
        data = pack(self._files())
        return self._library.publish(self._key, [Addition(Kind.TRITON, NAME, data)], bundle) is not None

    def _compiled(self) -> frozenset[str]:
        """Names of the folders, one per specialised kernel or module, that are complete."""
        if not self.folder.is_dir():
            return frozenset()
        # Of a kernel's files the group's is the last; a module is one file, which appears whole.
        last = (*self.folder.glob(f"*/{_GROUP_PREFIX}*"), *self.folder.glob(f"*/*{_MODULE_SUFFIX}"))
        return frozenset(path.parent.name for path in last)

    def _files(self) -> dict[str, bytes]:
        place = str(self.folder).encode()
        files = {}
        for name in sorted(self._compiled()):
            for path in sorted((self.folder / name).iterdir()):
                if path.is_file() and not path.is_symlink():
                    data = path.read_bytes()
                    is_group = path.name.startswith(_GROUP_PREFIX)
                    files[f"{name}/{path.name}"] = data.replace(place, _FOLDER) if is_group else data
        return files

    def _unpack(self, data: bytes) -> int:
        """Add folders that are not there; each appears whole or not at all."""
        num_added, names = 0, set()
        with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".unpacking-") as scratch:
            unpack(data, Path(scratch) / "files", self._library.config.max_unpacked_bytes)
            for source in sorted((Path(scratch) / "files").iterdir()):
                target = self.folder / source.name
                names.add(source.name)
                if target.exists():
                    continue
                for path in source.glob(f"{_GROUP_PREFIX}*"):
                    path.write_bytes(path.read_bytes().replace(_FOLDER, str(self.folder).encode()))
                try:
                    source.rename(target)
                    num_added += 1
                except OSError:
                    # Another process of this node was faster.
                    shutil.rmtree(source, ignore_errors=True)
        self._published = frozenset(names)
        return num_added
