"""Pieces as AOTInductor packages: slow to build (a C++ compiler runs), quick to load, with no compiler imported.

A package is loaded by torch's own C++ loader. ``aoti_load_package``, the public way, imports Inductor first.
"""

from __future__ import annotations

import atexit
import io
import os
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from workers.compile import torch_compat
from workers.compile.composites import lower
from workers.compile.errors import CompileError
from workers.compile.formats.base import PieceFormat
from workers.compile.formats.fx_code import function_of
from workers.compile.shared_library import check_shared_cxx_runtime, shared_runtime_compiler
from workers.compile.stitch import LoadedPiece

#: Name of the model inside a package.
_MODEL = "model"

_scratch_lock = threading.Lock()


class AOTInductorFormat(PieceFormat):
    """See the module."""

    name: ClassVar[str] = "aoti"
    #: Launch shapes are tuned on the device while building, and at one token a matrix product becomes a kernel of
    #: Inductor's own, fused with what surrounds it.
    tuned_size_options: ClassVar[Mapping[str, Any]] = {"coordinate_descent_tuning": True}

    def build(self, source: bytes, inputs: Sequence[torch.Tensor]) -> bytes:
        """Compile into a package.

        Raises:
            UnlinkablePieceError: The library would not load safely.
        """
        torch_compat.prepare_inductor()
        import torch._inductor
        from torch._inductor.package.package import package_aoti

        graph = lower(function_of(source), inputs)
        compiler = os.environ.get("CXX", "g++")
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            shared_runtime_compiler(compiler) as cxx,
            tempfile.TemporaryDirectory() as folder,
        ):
            options = {
                # Precompiling the common header takes longer than it saves on three or four pieces.
                "aot_inductor.precompile_headers": False,
                **self.options_for(inputs),
                "aot_inductor.package": True,
                "cpp.cxx": (cxx,),
            }
            files: Any = torch._inductor.aot_compile(graph, tuple(inputs), options=options)
            path = Path(folder) / "piece.pt2"
            package_aoti(str(path), files)
            data = path.read_bytes()
        for library in _libraries(data):
            check_shared_cxx_runtime(library)
        return data

    def load(self, data: bytes) -> LoadedPiece:
        """Unpack, ``dlopen``, and on CUDA let kernels be loaded at their first launch."""
        with tempfile.TemporaryDirectory(prefix="warmgraph-piece-") as folder:
            path = Path(folder) / "piece.pt2"
            path.write_bytes(data)
            with _loader_scratch():
                # One thread runs the model, so the loader's locks and its event after each run are not needed; a graph
                # capture could not have them either.
                loader = torch._C._aoti.AOTIModelPackageLoader(str(path), _MODEL, True, 1, -1)
        return LoadedPiece(loader.run, takes_list=True)


def _libraries(package: bytes) -> list[bytes]:
    """The shared libraries inside a package.

    Raises:
        CompileError: There is none.
    """
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        libraries = [archive.read(name) for name in archive.namelist() if name.endswith(".so")]
    if not libraries:
        raise CompileError("AOTInductor built a package without a library.")
    return libraries


@contextmanager
def _loader_scratch() -> Iterator[None]:
    """Have the loader unpack below a private folder that is removed when the process ends.

    It unpacks into the system's temporary folder, and leaves the files there if it never gets to its destructor.
    """
    # Python keeps to the folder that it has looked up once; the variable is for the loader.
    tempfile.gettempdir()
    with _scratch_lock:
        previous = os.environ.get("TMPDIR")
        os.environ["TMPDIR"] = str(_scratch_folder())
        try:
            yield
        finally:
            if previous is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = previous


def _scratch_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"warmgraph-loaded-{os.getuid()}-{os.getpid()}"
    if folder not in _scratch_folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        _scratch_folders.add(folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_scratch_folders: set[Path] = set()
