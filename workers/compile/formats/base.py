"""The seam between pieces and what compiles them: two methods, one factory.

Knows the names of the formats and imports none of them before it is asked for.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import fx

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
    """

    name: ClassVar[str]

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)

    @abc.abstractmethod
    def build(self, graph: fx.GraphModule) -> bytes:
        """Compile a piece; its placeholders carry fake values as ``meta["example_value"]``."""

    @abc.abstractmethod
    def load(self, data: bytes) -> LoadedPiece:
        """Make what :meth:`build` returned callable. ``data`` is code: it must have been verified."""


def make_format(name: str, options: Mapping[str, Any] | None = None) -> PieceFormat:
    """The format called ``name``.

    Raises:
        CompileError: There is none.
    """
    if name not in _HOMES:
        raise CompileError(f"There is no piece format {name!r}; use one of {', '.join(FORMAT_NAMES)}.")
    module, class_name = _HOMES[name]
    piece_format: PieceFormat = getattr(importlib.import_module(module), class_name)(options or {})
    return piece_format
