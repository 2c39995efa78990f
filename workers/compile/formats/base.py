"""The seam between pieces and what compiles them: two methods, one factory.

Knows the names of the formats and imports none of them before it is asked for.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from workers.compile.errors import CompileError
from workers.compile.stitch import LoadedPiece

_HOMES = {
    "fx": ("workers.compile.formats.fx_code", "FxFormat"),
    "standalone": ("workers.compile.formats.standalone", "StandaloneFormat"),
    "aoti": ("workers.compile.formats.aoti", "AOTInductorFormat"),
}

#: Names of all formats.
FORMAT_NAMES = tuple(_HOMES)


class PieceFormat(abc.ABC):
    """One way to compile, keep and run pieces.

    Args:
        options: Inductor options, by their names in ``torch._inductor.config``.
        size_options: On top of them, for pieces of one size; None takes ``tuned_size_options`` on CUDA.
    """

    name: ClassVar[str]
    #: What pays for pieces of one size on CUDA. Only for formats that keep what tuning found: with others every process
    #: would tune again.
    tuned_size_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, options: Mapping[str, Any], size_options: Mapping[str, Any] | None = None) -> None:
        self._options = dict(options)
        self._size_options = size_options

    def options_for(self, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Inductor options for a piece with these example inputs."""
        if any(isinstance(size, torch.SymInt) for value in inputs for size in value.shape):
            return self._options
        if self._size_options is not None:
            return self._options | dict(self._size_options)
        return self._options | (dict(self.tuned_size_options) if any(value.is_cuda for value in inputs) else {})

    @abc.abstractmethod
    def build(self, source: bytes, inputs: Sequence[torch.Tensor]) -> bytes:
        """Compile a piece.

        Args:
            source: What it computes, from :func:`workers.compile.formats.fx_code.source_of`; code, so verified.
            inputs: Fake tensors: the sizes to compile for.
        """

    @abc.abstractmethod
    def load(self, data: bytes) -> LoadedPiece:
        """Make what :meth:`build` returned callable. ``data`` is code: it must have been verified."""


def make_format(
    name: str, options: Mapping[str, Any] | None = None, size_options: Mapping[str, Any] | None = None
) -> PieceFormat:
    """The format called ``name``.

    Raises:
        CompileError: There is none.
    """
    if name not in _HOMES:
        raise CompileError(f"There is no piece format {name!r}; use one of {', '.join(FORMAT_NAMES)}.")
    module, class_name = _HOMES[name]
    piece_format: PieceFormat = getattr(importlib.import_module(module), class_name)(options or {}, size_options)
    return piece_format
