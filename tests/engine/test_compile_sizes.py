"""Pieces for one size: which options they are built with, and which batches take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.compile_cases import MixingModel, compile_mixing, mixing_inputs
from tests.tiny_models import tiny_checkpoint
from workers import LLM, SamplingParams
from workers.compile import piecewise
from workers.compile.errors import CompileError
from workers.compile.formats.base import make_format
from workers.compile.formats.fx_code import FxFormat
from workers.compile.model import warn_of_tuning
from workers.config import CompilationConfig

# Inductor's own imports use what PyTorch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

OPTIONS, SIZE_OPTIONS = {"shape_padding": True}, {"shape_padding": False, "max_autotune": True}


def fake(*, device: str) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, 3, device=device)


def test_what_carries_its_tuning_is_tuned_on_cuda() -> None:
    tuned = {"coordinate_descent_tuning": True}
    assert make_format("aoti", OPTIONS).options_for([fake(device="cuda")]) == OPTIONS | tuned
    assert make_format("aoti", OPTIONS).options_for([fake(device="cpu")]) == OPTIONS
    assert make_format("standalone", OPTIONS).options_for([fake(device="cuda")]) == OPTIONS


@pytest.mark.parametrize("piece_format", ["aoti", "standalone"])
def test_the_config_decides_what_one_size_is_built_with(piece_format: str) -> None:
    for size_options in (SIZE_OPTIONS, {}):
        builder = make_format(piece_format, OPTIONS, size_options)
        assert builder.options_for([fake(device="cuda")]) == OPTIONS | size_options


def test_only_pieces_of_one_size_get_the_options_for_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, dict[str, Any]]] = []
    build = FxFormat.build

    def spy(self: FxFormat, source: bytes, inputs: Sequence[torch.Tensor]) -> bytes:
        is_symbolic = any(isinstance(size, torch.SymInt) for value in inputs for size in value.shape)
        seen.append((is_symbolic, self.options_for(inputs)))
        return build(self, source, inputs)

    monkeypatch.setattr(FxFormat, "build", spy)
    compile_mixing(
        MixingModel(2),
        piece_format="auto",
        compile_sizes=[4],
        inductor_compile_config=OPTIONS,
        inductor_compile_config_for_sizes=SIZE_OPTIONS,
    )
    assert [is_symbolic for is_symbolic, _ in seen] == [True] * 3 + [False] * 3
    assert {options["max_autotune"] for is_symbolic, options in seen if not is_symbolic} == {True}
    assert not any("max_autotune" in options for is_symbolic, options in seen if is_symbolic)


@pytest.mark.parametrize("field", ["inductor_compile_config", "inductor_compile_config_for_sizes"])
def test_an_unknown_option_is_refused(field: str) -> None:
    with pytest.raises(CompileError, match="no option max_autotunes; did you mean max_autotune"):
        compile_mixing(MixingModel(1), piece_format="standalone", **{field: {"max_autotunes": True}})


def test_graphs_hold_the_pieces_of_their_padded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured at 1 and 4 tokens, the pieces of these sizes run; at others, those of every size."""
    calls: set[tuple[int | None, int]] = set()
    stitch = piecewise.stitch

    def recording(plan: Any, *args: Any, size: int | None = None, **options: Any) -> Callable[..., Any]:
        runner = stitch(plan, *args, size=size, **options)

        def run(*tensors: torch.Tensor) -> Any:
            calls.add((size, len(tensors[0])))
            return runner(*tensors)

        return run

    monkeypatch.setattr(piecewise, "stitch", recording)
    llm = LLM(
        str(tiny_checkpoint("llama")),
        dtype="float32",
        device="cpu",
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        skip_tokenizer_init=True,
        attention_backend="sdpa",
        compilation_config={
            "mode": "VLLM_COMPILE",
            "piece_format": "fx",
            "compile_sizes": [1, 4],
            "cudagraph_mode": "FULL_AND_PIECEWISE",
            "cudagraph_capture_sizes": [1, 2, 4, 8],
            "cudagraph_first_sizes": "all",
        },
    )
    assert calls == {(1, 1), (None, 2), (4, 4), (None, 8)}
    prompts = [{"prompt_token_ids": [3, 4, 5]}, {"prompt_token_ids": [6]}, {"prompt_token_ids": [7, 8]}]
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert {size for size, num_tokens in calls if num_tokens not in (1, 4)} == {None}


def test_a_size_that_is_not_listed_takes_the_pieces_of_every_size() -> None:
    model = MixingModel(2)
    compiled = compile_mixing(model, compile_sizes=[1, 4])
    for num_tokens in (1, 2, 4, 5):
        x_TE = mixing_inputs(num_tokens)
        torch.testing.assert_close(compiled(x_TE), model(x_TE))


def test_a_format_that_forgets_what_was_tuned_says_so(caplog: pytest.LogCaptureFixture) -> None:
    cuda = torch.device("cuda")
    tuned = {"compile_sizes": [1], "inductor_compile_config_for_sizes": {"coordinate_descent_tuning": True}}
    for quiet in ({**tuned, "piece_format": "aoti"}, {"piece_format": "standalone"}):
        warn_of_tuning(CompilationConfig(**quiet), cuda)
    warn_of_tuning(CompilationConfig(**tuned, piece_format="standalone"), torch.device("cpu"))
    assert "tunes again" not in caplog.text
    warn_of_tuning(CompilationConfig(**tuned), cuda)
    assert "standalone pieces do not keep what coordinate_descent_tuning finds" in caplog.text
