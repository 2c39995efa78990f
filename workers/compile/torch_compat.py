"""Every difference between the supported versions of PyTorch (2.11 to 2.13) that the compile layer meets.

Nothing else in workers.compile asks for a version or probes for an attribute. Importing this module imports no
compiler; the functions do.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from workers.compile.errors import CompileError

_RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def mark_unbacked(tensor: torch.Tensor, dim: int) -> None:
    """Give ``dim`` a size that the compiler knows nothing about, so that 0 and 1 are not special."""
    from torch._dynamo.decorators import mark_unbacked as mark

    mark(tensor, dim)


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Give ``dim`` a symbolic size whose typical value is the tensor's own; sizes 0 and 1 remain special."""
    from torch._dynamo.decorators import mark_dynamic as mark

    mark(tensor, dim)


def user_line(error: Exception) -> str:
    """``file:line`` of the model's code that an error of Dynamo points at."""
    stack: traceback.StackSummary | None = getattr(error, "real_stack", None)
    if stack:
        frame = stack[-1]
        return f"{frame.filename}:{frame.lineno} ({(frame.line or frame.name).strip()})"
    return "The model"


@contextlib.contextmanager
def kept_whole(functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Have Dynamo record calls of these functions as single nodes, inside the ``with`` block only."""
    from torch._dynamo import allow_in_graph, trace_rules

    for function in functions:
        allow_in_graph(function)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for function in functions:
            trace_rules._allowed_callable_ids.remove(id(function))


def has_effect(node: fx.Node) -> bool:
    """Whether a call does something besides giving a result.

    ``Node.is_impure()`` of 2.11 knows the schemas of overloads only, and Dynamo records packets.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = target.overloads()  # type: ignore[no-untyped-call]
        return any(getattr(target, overload)._schema.is_mutable for overload in overloads)
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if node.op == "call_method":
        return str(target).endswith("_") and not str(target).endswith("__")
    name = getattr(target, "__name__", "")
    return node.is_impure() or name.endswith("_") or name in ("setitem", "_check", "iadd", "imul", "isub", "itruediv")


def first_line(function: Callable[..., Any]) -> str:
    """``file:line (name)`` of a function."""
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno} ({function.__qualname__})"


def dynamo_compile(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    *,
    keeps_guards: bool,
    on_guard_failure: Callable[[str], None],
) -> Callable[..., Any]:
    """``torch.compile(function, backend, fullgraph=True)`` that tells which guard failed before a recompile.

    Args:
        keeps_guards: False drops every guard, so that there is never a reason to compile again.
    """
    import torch._dynamo

    options: dict[str, Any] = {"guard_fail_fn": lambda failure: on_guard_failure(str(failure.reason).strip())}
    if not keeps_guards:
        options["guard_filter_fn"] = lambda entries: [False] * len(entries)
    compiled: Callable[..., Any] = torch._dynamo.optimize(backend, nopython=True, **options)(function)
    return compiled


@functools.cache
def prepare_inductor() -> None:
    """Settle what Inductor of 2.11 finds out slowly.

    Before its first kernel on a CPU it starts a Python process per instruction set, which imports torch only so that
    the test library finds libtorch. Loading that library by name gives the same answer in a fraction of the time, as
    later releases do.
    """
    if _RELEASE >= (2, 12):
        return
    from torch._inductor.cpu_vec_isa import VecISA

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.exists():
        VecISA._avx_py_load = (
            f"import ctypes\nctypes.CDLL({str(library)!r}, ctypes.RTLD_GLOBAL)\nctypes.CDLL('__lib_path__')\n"
        )


def check_inductor_options(options: Iterable[str]) -> None:
    """Refuse names that this release's Inductor does not know.

    Raises:
        CompileError: There is one; the nearest name is offered.
    """
    import torch._inductor

    known = torch._inductor.list_options()
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise CompileError(f"torch._inductor.config of torch {torch.__version__} has no option {name}{hint}")


def check_caches() -> None:
    """Refuse to build what Inductor puts together from its caches where those are turned off; no patch turns them on.

    Raises:
        CompileError: They are.
    """
    if torch.compiler.config.force_disable_caches:
        raise CompileError(
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES is set, and standalone pieces are made from Inductor's caches: unset "
            "it, or set compilation_config.piece_format to aoti."
        )


def hash_compiler_sources() -> None:
    """Work out torch's digest of its own compiler, part of every artifact; it is kept for the rest of the process."""
    from torch._inductor.codecache import torch_key

    torch_key()


@contextlib.contextmanager
def loading_only() -> Iterator[None]:
    """Have Inductor start no pool of compile processes inside the ``with`` block.

    On CUDA an artifact leaves nothing to compile, and the pool's first process imports torch.
    """
    from torch._inductor import config

    with config.patch(compile_threads=1):
        yield


def artifact_function(artifact: Any) -> Callable[..., Any]:
    """What a standalone artifact calls, without the layers around it."""
    return artifact  # type: ignore[no-any-return]
