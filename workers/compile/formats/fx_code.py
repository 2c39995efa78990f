"""Pieces as the Python code of their graph: the source that compilers start from, and a format that runs as it stands.

What a piece costs as it stands is its operators and nothing else. The right format where every operator is a kernel of
its own already, as on a CPU with the native kernels: a compiler could only add a layer in between.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from workers.compile.errors import CompileError
from workers.compile.formats.base import PieceFormat
from workers.compile.stitch import LoadedPiece

_OP = re.compile(r"\btorch\.ops\.(\w+)\.(\w+)\b(?:\.(\w+)\b)?(?=\()")


class FxFormat(PieceFormat):
    """See the module."""

    name: ClassVar[str] = "fx"

    def build(self, source: bytes, inputs: Sequence[torch.Tensor]) -> bytes:
        """The source itself."""
        return source

    def load(self, data: bytes) -> LoadedPiece:
        """Compile the Python text and bind what it names."""
        return LoadedPiece(function_of(data))


def source_of(graph: fx.GraphModule) -> bytes:
    """The graph's Python code, and where to find what it names, with operators looked up once instead of at each call.

    Raises:
        CompileError: It refers to something that has no name.
    """
    python_code = graph.graph.python_code("self")
    imports = {name: _address(name, value) for name, value in python_code.globals.items()}
    ops: dict[str, list[str]] = {}

    def alias(match: re.Match[str]) -> str:
        namespace, op, overload = match.groups()
        name = f"_{namespace}_{op}_{overload or 'default'}"
        ops[name] = [namespace, op, overload or "default"]
        return name

    code = _OP.sub(alias, python_code.src).replace("def forward(self, ", "def forward(").strip()
    return json.dumps({"code": code, "imports": imports, "ops": ops}, sort_keys=True).encode()


def function_of(source: bytes) -> Callable[..., Sequence[torch.Tensor]]:
    """The function that :func:`source_of` wrote down."""
    piece = json.loads(source)
    names: dict[str, Any] = {"torch": torch, "inf": float("inf"), "nan": float("nan")}
    for name, (module, path) in piece["imports"].items():
        value = importlib.import_module(module)
        for attribute in filter(None, path.split(".")):
            value = getattr(value, attribute)
        names[name] = value
    for name, (namespace, op, overload) in piece["ops"].items():
        names[name] = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    exec(compile(piece["code"], "<piece>", "exec"), names)
    function: Callable[..., Sequence[torch.Tensor]] = names["forward"]
    return function


def _address(name: str, value: Any) -> tuple[str, str]:
    """Where a global of the generated code can be imported from: module, and path inside it."""
    if isinstance(value, float):
        return ("math", name)
    if value is torch or isinstance(value, type(torch)):
        return (value.__name__, "")
    if value is type(None):
        return ("types", "NoneType")
    module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module is None or path is None or "<locals>" in path:
        raise CompileError(f"A piece refers to {name}, which cannot be imported by name.")
    return (module, path)
