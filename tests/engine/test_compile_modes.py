"""Every mode gives eager's results for random batches, one token included, and compiles once."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch

from tests.compile_cases import (
    MixingModel,
    assert_equals_eager,
    assert_within_rounding,
    compile_decoder,
    compile_mixing,
    mixing_inputs,
    plain_decoder,
    tiny_decoder,
    use_plain_forms,
)
from tests.tiny_models import ARCHITECTURE_NAMES, NAMES, tiny_checkpoint
from workers import LLM, SamplingParams
from workers.artifacts.library import ArtifactLibrary
from workers.artifacts.names import blob_name
from workers.compile.errors import RecompileError
from workers.compile.model import compile_model
from workers.config import CompilationConfig
from workers.graphs.context import ForwardContext, set_forward_context
from workers.modes import CompilationMode

# Inductor's own imports and pickles use what PyTorch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


ENGINE_MODES = [
    {"mode": "STOCK_TORCH_COMPILE"},
    {"mode": "DYNAMO_TRACE_ONCE"},
    {"mode": "VLLM_COMPILE", "piece_format": "standalone", "compile_sizes": [1, 4]},
]


@pytest.mark.parametrize("name", NAMES)
def test_pieces_equal_eager_cold_and_warm(name: str) -> None:
    library, model = ArtifactLibrary.in_memory(), tiny_decoder(name)
    for is_warm in (False, True):
        compiled = compile_decoder(model, library=library, mode="VLLM_COMPILE", piece_format="fx", compile_sizes=[1, 5])
        assert compiled.report.is_warm is is_warm
        assert_equals_eager(model, compiled, seed=NAMES.index(name))


@pytest.mark.parametrize("mode", ["STOCK_TORCH_COMPILE", "DYNAMO_TRACE_ONCE"])
@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
def test_whole_graphs_equal_eager(name: str, mode: str) -> None:
    model = tiny_decoder(name)
    compiled = compile_decoder(model, mode=mode)
    for seed in range(2):
        assert_equals_eager(model, compiled, seed)
    assert (compiled.counters.num_traces, compiled.counters.num_recompiles_refused) == (1, 0)


@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
def test_inductor_pieces_equal_eager_cold_and_warm(name: str) -> None:
    library, model = ArtifactLibrary.in_memory(), tiny_decoder(name)
    for is_warm in (False, True):
        compiled = compile_decoder(model, library=library, mode="VLLM_COMPILE", piece_format="standalone")
        assert compiled.report.is_warm is is_warm
        assert_equals_eager(model, compiled)


@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
def test_pieces_in_bf16_are_right_within_rounding(name: str) -> None:
    model = tiny_decoder(name, torch.bfloat16)
    compiled = compile_decoder(model, mode="VLLM_COMPILE", piece_format="fx")
    assert_within_rounding(tiny_decoder(name), model, compiled)


def test_whole_graphs_in_bf16_are_right_within_rounding() -> None:
    model = tiny_decoder("qwen3", torch.bfloat16)
    assert_within_rounding(tiny_decoder("qwen3"), model, compile_decoder(model, mode="DYNAMO_TRACE_ONCE"))


def test_fused_pieces_in_bf16_are_right_within_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor keeps sums in fp32 that eager rounds; that must not make it worse."""
    use_plain_forms(monkeypatch)
    exact, model = plain_decoder("qwen3"), plain_decoder("qwen3", torch.bfloat16)
    compiled = compile_decoder(model, mode="VLLM_COMPILE", piece_format="standalone")
    assert_within_rounding(exact, model, compiled)


@pytest.mark.parametrize("compilation", ENGINE_MODES, ids=lambda compilation: compilation["mode"])
def test_the_engines_tokens_are_those_of_eager(compilation: dict[str, Any]) -> None:
    prompts = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (1, 7, 30, 12)]
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    tokens = []
    for config in ({"mode": "NONE"}, compilation):
        llm = LLM(
            str(tiny_checkpoint("qwen3")),
            dtype="float32",
            device="cpu",
            max_model_len=64,
            max_num_seqs=8,
            max_num_batched_tokens=32,
            skip_tokenizer_init=True,
            compilation_config=config,
        )
        tokens.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
    assert tokens[0] == tokens[1]


def test_fused_pieces_equal_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the native kernels Inductor sees every operation but products, as on a GPU, and fuses them.

    All that lies between two products becomes one kernel, the residual's sum and the norm after it too, which no pass
    has to see to.
    """
    use_plain_forms(monkeypatch)
    model, library = plain_decoder("qwen3"), ArtifactLibrary.in_memory()
    ops = ("warmgraph::attention", "warmgraph::rope_attention")
    compiled = compile_decoder(
        model, library=library, splitting_ops=ops, mode="VLLM_COMPILE", piece_format="standalone"
    )
    assert compiled.plan is not None
    pieces = compiled.plan.pieces.values()
    opaque = {op for piece in pieces for op in piece.ops if "warmgraph" in op}
    assert all("linear" in op for op in opaque), opaque
    num_norms = [sum(count for op, count in piece.ops.items() if "rms_norm" in op) for piece in pieces]
    builds = [build for piece in pieces if (build := piece.find_build("standalone", None))]
    blobs = [library.store.get(blob_name(build.sha256), build.num_bytes) or b"" for build in builds]
    assert [data.count(b" = async_compile.") for data in blobs] == num_norms == [1, 2, 2]
    assert_equals_eager(model, compiled)


@pytest.mark.parametrize("num_tokens", [1, 4, 6])
def test_pieces_for_one_size_equal_eager(num_tokens: int) -> None:
    model = MixingModel(2)
    compiled = compile_mixing(model, piece_format="standalone", compile_sizes=[1, 4])
    x_TE = mixing_inputs(num_tokens)
    torch.testing.assert_close(compiled(x_TE), model(x_TE), atol=1e-5, rtol=1e-5)


def test_modes_have_two_names_and_numbers() -> None:
    for value in ("vllm_compile", "PIECEWISE_COMPILE", 3):
        assert CompilationConfig(mode=value).mode is CompilationMode.VLLM_COMPILE


def test_enforce_eager_wins() -> None:
    model = MixingModel(2)
    config = CompilationConfig(mode="VLLM_COMPILE", piece_format="fx")
    compiled = compile_model(model, config, {"x_TE": mixing_inputs()}, enforce_eager=True)
    assert compiled.mode is CompilationMode.NONE
    torch.testing.assert_close(compiled(mixing_inputs()), model(mixing_inputs()))


@torch.inference_mode()
def test_a_recompile_is_an_error_that_names_the_line_and_the_guard(caplog: pytest.LogCaptureFixture) -> None:
    model = MixingModel(2)
    compiled = compile_mixing(model, mode="STOCK_TORCH_COMPILE")
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(RecompileError, match=r"compile_cases\.py:\d+ \(MixingModel.forward\)"),
    ):
        compiled(mixing_inputs().double())
    assert "dtype mismatch" in caplog.text
    assert compiled.counters.num_recompiles_refused == 1
    for num_tokens in random.Random(0).sample(range(1, 40), 12):
        x_TE = mixing_inputs(num_tokens, seed=num_tokens)
        torch.testing.assert_close(compiled(x_TE), model(x_TE), atol=1e-5, rtol=1e-5)
    assert compiled.counters.num_traces == 1


@torch.inference_mode()
def test_trace_once_has_no_guards_to_fail() -> None:
    model = MixingModel(2)
    compiled = compile_mixing(model, mode="DYNAMO_TRACE_ONCE")
    for module in model.modules():
        module.training = not module.training  # a guard of the stock mode
    x_TE = mixing_inputs(9)
    torch.testing.assert_close(compiled(x_TE), model(x_TE), atol=1e-5, rtol=1e-5)
    assert compiled.counters.num_traces == 1


def test_tracing_leaves_the_forward_context_alone() -> None:
    context = ForwardContext(None, None, ())
    with set_forward_context(context):
        compile_mixing(MixingModel(1))
