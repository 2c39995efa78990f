"""Pieces as ``torch._inductor.standalone_compile`` artifacts: quick to build; loading imports the compiler.

On CUDA the artifact carries its kernels as binaries, so that loading compiles nothing. On a CPU it carries C++ source,
which is compiled again where Inductor's own cache does not have it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from workers.compile import torch_compat
from workers.compile.composites import lower
from workers.compile.formats.base import PieceFormat
from workers.compile.formats.fx_code import function_of
from workers.compile.prefetch import wait_for_compiler
from workers.compile.stitch import LoadedPiece


class StandaloneFormat(PieceFormat):
    """See the module."""

    name: ClassVar[str] = "standalone"

    def build(self, source: bytes, inputs: Sequence[torch.Tensor]) -> bytes:
        """Compile; tuning, if the options ask for it, runs on the current device."""
        from torch._inductor import standalone_compile

        torch_compat.check_caches()
        torch_compat.prepare_inductor()
        graph = lower(function_of(source), inputs)
        with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            options = {"config_patches": self.options_for(inputs)}
            artifact = standalone_compile(graph, list(inputs), dynamic_shapes="from_graph", options=options, aot=True)
            path = Path(folder) / "piece"
            artifact.save(path=str(path), format="binary")
            return path.read_bytes()

    def load(self, data: bytes) -> LoadedPiece:
        """Unpickle; what it holds refers to torch's own modules only."""
        wait_for_compiler()
        from torch._inductor.standalone_compile import CompiledArtifact

        torch_compat.prepare_inductor()
        with tempfile.TemporaryDirectory() as folder, torch_compat.loading_only():
            path = Path(folder) / "piece"
            path.write_bytes(data)
            artifact = CompiledArtifact.load(path=str(path), format="binary")
        return LoadedPiece(torch_compat.artifact_function(artifact))
