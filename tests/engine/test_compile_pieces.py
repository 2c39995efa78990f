"""Tracing, splitting and stitching: how many pieces there are, what they take, and that they line up."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.compile_cases import (
    HIDDEN,
    MIXING_OPS,
    MixingModel,
    compile_decoder,
    compile_mixing,
    define_mixing_op,
    mixing_inputs,
    tiny_decoder,
)
from workers.artifacts.errors import Refusal
from workers.artifacts.library import ArtifactLibrary
from workers.artifacts.names import blob_name
from workers.compile import PieceInfo, compile_model, support_torch_compile
from workers.compile.compiler import SplitModel, split_model
from workers.compile.counters import CompileCounters
from workers.compile.errors import (
    BuildFailedError,
    CompileError,
    GraphBreakError,
    PlanMismatchError,
    RecompileError,
)
from workers.compile.key import bundle_key
from workers.compile.passes.standard import standard_passes
from workers.compile.piece_set import PieceSet
from workers.compile.piecewise import PiecewiseModel
from workers.compile.plan import OpStep, PieceStep
from workers.compile.stitch import source
from workers.compile.weights import weight_names
from workers.config import CompilationConfig
from workers.graphs.context import ForwardContext, set_forward_context

# Inductor's own imports use what PyTorch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

CONFIG = CompilationConfig(mode="VLLM_COMPILE", piece_format="fx")


def split_mixing(num_layers: int, **switches: bool) -> SplitModel:
    passes = standard_passes(switches)
    return split_model(
        MixingModel(num_layers),
        {"x_TE": mixing_inputs()},
        {"x_TE": 0},
        splitting_ops=MIXING_OPS,
        passes=passes,
        factors={},
    )


def test_the_number_of_pieces_does_not_depend_on_depth() -> None:
    shallow, deep = split_mixing(3), split_mixing(9)
    assert list(shallow.graphs) == list(deep.graphs)
    assert len(deep.graphs) == 3
    assert [deep.plan.piece_calls().count(key) for key in deep.graphs] == [1, 8, 1]


def test_a_plan_holds_what_differs_between_layers() -> None:
    plan = split_mixing(3).plan
    assert [step.args[-1] for step in plan.steps if isinstance(step, OpStep)] == [
        {"const": layer} for layer in range(3)
    ]
    middle = [step for step in plan.steps if isinstance(step, PieceStep)][1:3]
    names = [{plan.weights[int(arg[1:])].name for arg in step.args if str(arg).startswith("w")} for step in middle]
    assert names == [{f"layers.{layer}.linear.weight", f"layers.{layer}.linear.bias"} for layer in (1, 2)]
    assert plan.arguments[0].shape == ("n0", HIDDEN)


def test_pieces_take_tensors_only() -> None:
    for graph in split_mixing(3).graphs.values():
        assert all(isinstance(n.meta["example_value"], torch.Tensor) for n in graph.graph.find_nodes(op="placeholder"))


def test_results_are_freed_when_they_are_no_longer_needed() -> None:
    text = source(split_mixing(3).plan)
    created = set(re.findall(r"\bv\d+\b", text))
    freed = {name for line in text.splitlines() if "del " in line for name in re.findall(r"v\d+", line)}
    returned = set(re.findall(r"v\d+", text.splitlines()[-1]))
    assert created == freed | returned


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 7])
def test_stitched_pieces_give_the_models_result(num_tokens: int) -> None:
    model = MixingModel(3)
    compiled = compile_mixing(model, compile_sizes=[4])
    x_TE = mixing_inputs(num_tokens, seed=num_tokens)
    torch.testing.assert_close(compiled(x_TE), model(x_TE), atol=0, rtol=0)


@pytest.mark.parametrize("num_tokens", [2, 4, 7])
def test_chosen_rows_go_on_behind_the_last_split_op(num_tokens: int) -> None:
    """With pieces of every size; those compiled for 4 tokens cannot take fewer."""
    num_rows: list[list[int]] = []

    def keep(*tensors: torch.Tensor) -> list[torch.Tensor]:
        num_rows.append([len(tensor) for tensor in tensors])
        return [tensor[-1:] for tensor in tensors]

    model = MixingModel(3)
    compiled = compile_mixing(model, compile_sizes=[4], keep_rows=keep)
    x_TE = mixing_inputs(num_tokens)
    keeps = num_tokens != 4
    torch.testing.assert_close(compiled(x_TE), model(x_TE)[-1:] if keeps else model(x_TE), atol=0, rtol=0)
    assert num_rows == ([[num_tokens, num_tokens]] if keeps else [])


@pytest.mark.parametrize("change", [{"stride": (1, 4)}, {"shape": ("8*n0", HIDDEN)}, {"shape": (HIDDEN, "n0")}])
def test_all_rows_go_on_where_inputs_are_not_dense_rows(change: dict[str, Any]) -> None:
    plan = split_mixing(3).plan
    assert "keep_rows" in source(plan, keeps_rows=True)
    record = plan.pieces[plan.piece_calls()[-1]]
    record.inputs[0] = dataclasses.replace(record.inputs[0], **change)
    assert "keep_rows" not in source(plan, keeps_rows=True)


def test_all_rows_go_on_where_there_is_no_split_op() -> None:
    def keep(*tensors: torch.Tensor) -> list[torch.Tensor]:
        raise AssertionError("a piece that reads other rows than its own must have them all")

    model = tiny_decoder("llama")
    whole = compile_model(
        model,
        CONFIG,
        {"input_ids_T": torch.arange(4), "positions_T": torch.arange(4)},
        splitting_ops=("test_compile::mix",),
        keep_rows=keep,
    )
    with set_forward_context(ForwardContext(None, None, ())):
        assert len(whole(torch.arange(5), torch.arange(5))) == 5


def test_each_piece_call_is_wrapped_in_order() -> None:
    infos: list[PieceInfo] = []
    calls: list[PieceInfo] = []

    def wrap(piece: Callable[..., Any], info: PieceInfo) -> Callable[..., Any]:
        infos.append(info)

        def wrapped(*args: torch.Tensor) -> Any:
            calls.append(info)
            return piece(*args)

        return wrapped

    model = MixingModel(3)
    compiled = compile_mixing(model, wrap_piece=wrap, compile_sizes=[2])
    assert [(info.index, info.size) for info in infos] == [(index, size) for size in (None, 2) for index in range(4)]
    assert [info.is_first for info in infos[:4]] == [True, False, False, False]
    assert [info.is_last for info in infos[:4]] == [False, False, False, True]
    assert infos[1].key == infos[2].key != infos[0].key
    for num_tokens, expected in ((3, infos[:4]), (2, infos[4:])):
        calls.clear()
        x_TE = mixing_inputs(num_tokens)
        torch.testing.assert_close(compiled(x_TE), model(x_TE))
        assert calls == expected


def test_the_decoders_pieces_and_ops_are_counted() -> None:
    compiled = compile_decoder(tiny_decoder("qwen3"), mode="VLLM_COMPILE", piece_format="fx")
    assert compiled.plan is not None
    assert (compiled.report.num_pieces, compiled.report.num_unique_pieces) == (4, 3)
    first, middle, last = compiled.plan.pieces.values()
    assert middle.ops["warmgraph::packed_linear"] == 4
    assert middle.ops["warmgraph::apply_rope"] == 1
    assert "warmgraph::apply_rope" in first.ops
    assert "warmgraph::apply_rope" not in last.ops


@support_torch_compile
class _Breaks(nn.Module):
    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        if x_TE.sum() > 0:  # the line that breaks
            return x_TE
        return x_TE + 1


@pytest.mark.parametrize("mode", ["STOCK_TORCH_COMPILE", "DYNAMO_TRACE_ONCE", "VLLM_COMPILE"])
def test_a_graph_break_names_its_line(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    counters = CompileCounters()
    with (
        caplog.at_level("ERROR", logger="workers.compile"),
        pytest.raises(GraphBreakError, match=r"test_compile_pieces\.py:\d+ \(if x_TE\.sum\(\) > 0:") as error,
    ):
        compile_model(_Breaks(), CompilationConfig(mode=mode), {"x_TE": mixing_inputs()}, counters=counters)
    assert (counters.num_graph_breaks, counters.num_traces) == (1, 0)
    assert str(error.value) in [record.message for record in caplog.records if record.name == "workers.compile.trace"]


@support_torch_compile
class _BreaksLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.is_odd = False

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        if self.is_odd and x_TE.sum() > 0:  # the line that breaks
            return x_TE
        return x_TE + 1


@torch.inference_mode()
def test_a_graph_break_while_serving_names_its_line() -> None:
    """A guard fails, and what would be compiled instead is not one graph."""
    model, counters = _BreaksLater(), CompileCounters()
    config = CompilationConfig(mode="STOCK_TORCH_COMPILE")
    compiled = compile_model(model, config, {"x_TE": mixing_inputs()}, counters=counters)
    model.is_odd = True
    with pytest.raises(GraphBreakError, match=r"test_compile_pieces\.py:\d+ \(if self.is_odd and x_TE"):
        compiled(mixing_inputs())
    assert (counters.num_graph_breaks, counters.num_traces, counters.num_recompiles_refused) == (1, 1, 0)
    model.is_odd = False
    torch.testing.assert_close(compiled(mixing_inputs()), mixing_inputs() + 1)


@support_torch_compile
class _Odd(nn.Module):
    """Two results, an op with a result at the cut, and a buffer that is an input twice."""

    def __init__(self) -> None:
        super().__init__()
        define_mixing_op()
        self.register_buffer("shift", torch.arange(HIDDEN).float())

    def forward(self, x_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left_TE, right_TE = (x_TE * self.shift).chunk(2, dim=-1)
        cube_TE = torch.ops.test_compile.cube(left_TE + right_TE)
        return cube_TE.relu() + self.shift[: HIDDEN // 2], right_TE + 1


def test_split_ops_may_have_results_and_models_several() -> None:
    model = _Odd()
    config = CompilationConfig(mode="VLLM_COMPILE", piece_format="fx")
    ops = ("test_compile::cube",)
    compiled = compile_model(model, config, {"x_TE": mixing_inputs()}, splitting_ops=ops)
    assert compiled.report.num_pieces == 2
    for num_tokens in (1, 5):
        x_TE = mixing_inputs(num_tokens)
        torch.testing.assert_close(compiled(x_TE), model(x_TE))


@support_torch_compile
class _HasConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = [torch.ones(HIDDEN)]

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        return x_TE + self.table[0]


def test_a_tensor_that_is_no_weight_is_refused() -> None:
    config = CompilationConfig(mode="VLLM_COMPILE", piece_format="fx")
    with pytest.raises(CompileError, match="register it as a buffer"):
        compile_model(_HasConstant(), config, {"x_TE": mixing_inputs()})


@pytest.mark.parametrize("mode", ["DYNAMO_TRACE_ONCE", "VLLM_COMPILE"])
@torch.inference_mode()
def test_arguments_that_were_not_compiled_for_are_refused(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where there are no guards: by name, with the line of the model, a log record and a count."""
    compiled = compile_mixing(MixingModel(2), mode=mode)
    compiled(mixing_inputs(3))
    x_TE = mixing_inputs()
    with caplog.at_level("ERROR", logger="workers.compile"):
        for wrong, sentence in (
            (x_TE.double(), r"x_TE is torch\.float64 \(4, 8\), and the model was compiled for torch\.float32"),
            (x_TE[None], "with 2 dimensions"),
            (x_TE[:, :5], r"8 in dimension 1"),
        ):
            with pytest.raises(RecompileError, match=sentence) as error:
                compiled(wrong)
            assert re.match(r".*compile_cases\.py:\d+ \(MixingModel.forward\) would compile again", str(error.value))
    records = [record for record in caplog.records if record.name == "workers.compile.arguments"]
    assert compiled.counters.num_recompiles_refused == len(records) == 3
    compiled(x_TE)


@support_torch_compile
class _TwoInputs(nn.Module):
    def forward(self, x_TE: torch.Tensor, unread_T: torch.Tensor, y_TE: torch.Tensor) -> torch.Tensor:
        torch._check(x_TE.shape[0] == y_TE.shape[0])  # type: ignore[no-untyped-call]
        return x_TE + y_TE


def test_arguments_must_agree_on_the_number_of_tokens() -> None:
    config = CompilationConfig(mode="VLLM_COMPILE", piece_format="fx")
    example = {"x_TE": mixing_inputs(), "unread_T": torch.ones(4), "y_TE": mixing_inputs(seed=1)}
    compiled = compile_model(_TwoInputs(), config, example)
    torch.testing.assert_close(compiled(*example.values()), example["x_TE"] + example["y_TE"])
    with pytest.raises(RecompileError, match=r"y_TE is torch\.float32 \(3, 8\).* 4 in dimension 0"):
        compiled(mixing_inputs(), torch.ones(4), mixing_inputs(3))


def test_a_second_process_finds_everything_in_the_store() -> None:
    library, model = ArtifactLibrary.in_memory(), MixingModel(2)
    cold = compile_mixing(model, library=library)
    warm = compile_mixing(MixingModel(2, seed=1), library=library)
    assert (cold.report.is_warm, warm.report.is_warm) == (False, True)
    assert (cold.counters.num_traces, cold.counters.num_compiled) == (1, 3)
    assert (warm.counters.num_traces, warm.counters.num_compiled, warm.counters.num_loaded) == (0, 0, 3)
    x_TE = mixing_inputs()
    torch.testing.assert_close(warm(x_TE), MixingModel(2, seed=1)(x_TE))


def test_what_a_start_does_does_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold and warm: the same builds, loads and reads at 3 and at 24 layers; only the plan is longer."""
    reads: list[str] = []
    read = ArtifactLibrary.read

    def counted(self: ArtifactLibrary, bundle: Any, entry: Any) -> bytes:
        reads.append(entry.kind)
        return read(self, bundle, entry)

    monkeypatch.setattr(ArtifactLibrary, "read", counted)
    starts, plan_bytes = [], []
    for num_layers in (3, 24):
        library = ArtifactLibrary.in_memory()
        for _ in range(2):
            reads.clear()
            compiled = compile_mixing(MixingModel(num_layers), library=library, compile_sizes=[1])
            counters = dataclasses.astuple(compiled.counters)
            starts.append((compiled.report.is_warm, compiled.report.num_unique_pieces, counters, len(reads)))
        assert compiled.plan is not None
        plan_bytes.append(len(compiled.plan.to_json()))
    assert starts[:2] == starts[2:]
    assert [is_warm for is_warm, *_ in starts[:2]] == [False, True]
    assert plan_bytes[1] - plan_bytes[0] < 21 * 600


def test_what_compiled_code_depends_on_is_part_of_the_key() -> None:
    library, model = ArtifactLibrary.in_memory(), MixingModel(2)
    compile_mixing(model, library=library)
    assert not compile_mixing(model, library=library, pass_config={"noop_elimination": False}).report.is_warm
    for changed in (
        {"inductor_compile_config": {"shape_padding": True}},
        {"inductor_compile_config_for_sizes": {"max_autotune": True}},
    ):
        assert not compile_mixing(model, library=library, piece_format="auto", **changed).report.is_warm
    # Sizes add builds to the plan.
    assert not compile_mixing(model, library=library, compile_sizes=[4]).report.is_warm
    assert compile_mixing(model, library=library, compile_sizes=[4]).report.is_warm
    assert compile_mixing(model, library=library).report.is_warm


def test_a_damaged_piece_is_not_run_but_built_again() -> None:
    library = ArtifactLibrary.in_memory()
    plan = compile_mixing(MixingModel(2), library=library).plan
    assert plan is not None
    blob = blob_name(next(iter(plan.pieces.values())).builds[0].sha256)
    library.store.delete(blob)
    library.store.put_if_absent(blob, json.dumps({"code": "raise SystemExit"}).encode())
    again = compile_mixing(MixingModel(2), library=library)
    assert not again.report.is_warm
    torch.testing.assert_close(again(mixing_inputs()), MixingModel(2)(mixing_inputs()))
    assert [mark.reason for mark in library.marks.quarantined()] == [Refusal.DAMAGED_BLOB]
    assert compile_mixing(MixingModel(2), library=library).report.is_warm


def transposed(model: MixingModel) -> MixingModel:
    """The same values in another layout."""
    layer: Any = model.layers[1]
    layer.linear.weight = nn.Parameter(layer.linear.weight.t().contiguous().t(), False)
    return model


def test_a_plan_for_other_weights_is_not_run() -> None:
    library = ArtifactLibrary.in_memory()
    plan = compile_mixing(MixingModel(2), library=library).plan
    assert plan is not None
    with pytest.raises(PlanMismatchError, match=r"layers\.1\.linear\.weight has stride \[1, 8\], not \[8, 1\]"):
        PiecewiseModel(PieceSet(plan, "fx", library), weight_names(transposed(MixingModel(2))))


def test_a_bundle_for_other_weights_is_quarantined_and_built_once_more() -> None:
    library = ArtifactLibrary.in_memory()
    compile_mixing(MixingModel(2), library=library)
    model = transposed(MixingModel(2))
    compiled = compile_mixing(model, library=library)
    assert not compiled.report.is_warm
    torch.testing.assert_close(compiled(mixing_inputs()), model(mixing_inputs()))
    assert [mark.reason for mark in library.marks.quarantined()] == [Refusal.STRUCTURE]
    with pytest.raises(BuildFailedError, match="was wrong twice"):
        compile_mixing(MixingModel(2), library=library)


def test_pieces_of_another_model_are_taken_over() -> None:
    library = ArtifactLibrary.in_memory()
    keys = [bundle_key(CONFIG, torch.device("cpu"), {"x_TE": 0}, graph={"layers": count}) for count in (2, 5)]
    shallow, deep = (
        compile_model(
            MixingModel(count), CONFIG, {"x_TE": mixing_inputs()}, splitting_ops=MIXING_OPS, library=library, key=key
        )
        for count, key in zip((2, 5), keys, strict=True)
    )
    assert (shallow.counters.num_compiled, shallow.counters.num_shared) == (3, 0)
    assert (deep.counters.num_compiled, deep.counters.num_shared) == (0, 3)
    torch.testing.assert_close(deep(mixing_inputs()), MixingModel(5)(mixing_inputs()))
    assert len(library.store.list("blobs/")) == 3 + 1 + 2  # pieces and what they give are shared, plans are not


def test_options_that_nothing_reads_are_said(caplog: pytest.LogCaptureFixture) -> None:
    options = {"inductor_compile_config": {"shape_padding": True}}
    compile_mixing(MixingModel(1), piece_format="auto", **options)
    assert "fx pieces run as they are: Inductor options are for the formats that are built later" in caplog.text
    compile_mixing(MixingModel(1), mode="NONE", piece_format="auto", **options)
    assert "compilation mode NONE takes no notice of inductor_compile_config" in caplog.text
    caplog.clear()
    compile_mixing(MixingModel(1), compile_sizes=[1])
    assert "no notice" not in caplog.text
    assert "run as they are" not in caplog.text
