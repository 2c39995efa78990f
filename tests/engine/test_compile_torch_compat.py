"""What the compile layer asks of PyTorch, on the release that is installed; and both sides of each difference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

from tests.compile_cases import MixingModel, define_mixing_op, mixing_inputs
from workers.compile import torch_compat
from workers.compile.errors import CompileError
from workers.compile.trace import trace

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.mark.parametrize(("release", "is_replaced"), [((2, 11), True), ((2, 12), False), ((2, 13), False)])
def test_the_probe_of_instruction_sets_imports_no_torch(
    release: tuple[int, int], is_replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.cpu_vec_isa import VecISA

    monkeypatch.setattr(torch_compat, "_RELEASE", release)
    monkeypatch.setattr(VecISA, "_avx_py_load", "import torch")
    torch_compat.prepare_inductor.__wrapped__()
    assert (VecISA._avx_py_load != "import torch") is is_replaced
    if is_replaced:
        # As Inductor does: a library that needs libtorch, here libtorch itself, loads in a bare process.
        library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        code = (
            VecISA._avx_py_load.replace("__lib_path__", str(library)) + "import sys; assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def test_caches_that_are_turned_off_are_the_users_to_mend() -> None:
    torch_compat.check_caches()
    turned_off = torch.compiler.config.patch(force_disable_caches=True)
    with turned_off, pytest.raises(CompileError, match=r"unset it, or set .*piece_format to aoti"):
        torch_compat.check_caches()


@pytest.mark.parametrize("form", ["packet", "overload", "method", "in place", "pure"])
def test_effects_are_seen_however_an_op_is_recorded(form: str) -> None:
    """Dynamo records packets, of which 2.11 itself says that they have none."""
    define_mixing_op()
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = {
        "packet": lambda: graph.call_function(torch.ops.test_compile.mix, (x, x, 0)),
        "overload": lambda: graph.call_function(torch.ops.test_compile.mix.default, (x, x, 0)),
        "method": lambda: graph.call_method("add_", (x, 1)),
        "in place": lambda: graph.call_function(torch.ops.aten.add_, (x, 1)),
        "pure": lambda: graph.call_function(torch.ops.test_compile.cube, (x,)),
    }[form]()
    assert torch_compat.has_effect(node) is (form != "pure")


def test_functions_are_kept_whole_in_their_block_only() -> None:
    with torch_compat.kept_whole([_double]):
        inside = targets_of(lambda x: _double(x) + 1)
    assert (_double in inside, _double in targets_of(lambda x: _double(x) + 2)) == (True, False)


def targets_of(function: Callable[..., torch.Tensor]) -> list[object]:
    """What Dynamo's graph of a function calls."""
    captured: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: object) -> Callable[..., object]:
        captured.append(graph)
        return graph.forward

    torch.compile(function, backend=keep, fullgraph=True)(torch.ones(2))
    return [node.target for node in captured[0].graph.nodes]


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_sizes_are_unknown_to_a_trace() -> None:
    traced = trace(MixingModel(1), {"x_TE": mixing_inputs(4)}, {"x_TE": 0})
    (argument,) = traced.arguments.values()
    assert isinstance(argument.meta["example_value"].shape[0], torch.SymInt)


def test_a_load_starts_no_processes_and_finds_the_digest_made() -> None:
    from torch._inductor import codecache, config

    torch_compat.hash_compiler_sources()
    before = config.compile_threads
    with torch_compat.loading_only():
        assert config.compile_threads == 1
    assert config.compile_threads == before
    assert len(codecache.torch_key()) == 32


def test_lines_are_named() -> None:
    assert torch_compat.first_line(_double).startswith(f"{__file__}:")
    assert torch_compat.user_line(ValueError()) == "The model"
