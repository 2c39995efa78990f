"""Prefills: most of the last layer is computed for each request's last token alone, and what is sampled is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import tiny_checkpoint
from workers import LLM, SamplingParams
from workers.graphs import BatchDescriptor, CUDAGraphMode, keep_last_rows
from workers.model import decoder
from workers.runner import graphed_model
from workers.runner.graphed_model import GraphedModel
from workers.runner.input_batch import StepInputs

# Inductor's own imports use what PyTorch has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

PROMPTS = [list(range(3, 3 + length)) for length in (1, 7, 70, 12, 5)]

PIECES = {"mode": "VLLM_COMPILE", "piece_format": "fx"}

#: Forms of the model, and whether each of them leaves rows out.
FORMS: dict[str, tuple[dict[str, Any], bool]] = {
    "eager": ({"attention_backend": "sdpa", "enforce_eager": True}, True),
    "eager, native attention": ({"attention_backend": "cpu", "enforce_eager": True}, True),
    "native program": ({"attention_backend": "cpu"}, False),
    "pieces": (
        {"attention_backend": "sdpa", "compilation_config": PIECES},
        True,
    ),
    "pieces in graphs": (
        {
            "attention_backend": "sdpa",
            "compilation_config": PIECES
            | {
                "cudagraph_mode": "PIECEWISE",
                "cudagraph_capture_sizes": [8, 16, 32],
                "cudagraph_first_sizes": "all",
            },
        },
        False,
    ),
    "pieces of one size": (
        {"attention_backend": "sdpa", "compilation_config": PIECES | {"compile_sizes": list(range(1, 33))}},
        False,
    ),
    "whole": ({"attention_backend": "sdpa", "compilation_config": {"mode": "DYNAMO_TRACE_ONCE"}}, False),
}


def make_llm(**options: Any) -> LLM:
    return LLM(
        str(tiny_checkpoint("llama")),
        dtype="float32",
        device="cpu",
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        skip_tokenizer_init=True,
        artifacts={"store": None},
        **options,
    )


@pytest.mark.parametrize("form", FORMS)
def test_each_requests_last_row_is_that_of_the_whole_batch(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, leaves_out = FORMS[form]
    steps: list[tuple[int, int]] = []
    kept: list[int] = []

    def keep(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = keep_last_rows(*tensors)
        kept.extend({len(after) for before, after in zip(tensors, rows, strict=True) if after is not before})
        return rows

    def run(graphs: GraphedModel, inputs: StepInputs, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> torch.Tensor:
        whole_TE = graphs.run(inputs, mode, descriptor).clone()
        last_RE = run_for_last_rows(graphs, inputs, mode, descriptor)
        torch.testing.assert_close(last_RE, whole_TE[inputs.geometry.last_rows()], atol=1e-5, rtol=1e-5)
        steps.append((len(whole_TE), len(last_RE)))
        return last_RE

    run_for_last_rows = GraphedModel.run_for_last_rows
    monkeypatch.setattr(GraphedModel, "run_for_last_rows", run)
    for module in (decoder, graphed_model):
        monkeypatch.setattr(module, "keep_last_rows", keep)
    llm = make_llm(**options)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    # Alone, a prompt's first steps sample nothing.
    llm.generate([{"prompt_token_ids": PROMPTS[2][::-1]}], params, use_tqdm=False)
    assert steps[-3:-1] == [(32, 1), (32, 1)]
    assert sum(num_tokens for num_tokens, _ in steps) >= sum(map(len, PROMPTS))
    assert any(num_tokens > num_reqs > 1 for num_tokens, num_reqs in steps)
    assert kept == ([num_reqs for _, num_reqs in steps] if leaves_out else [])


def test_prompt_logprobs_read_every_row() -> None:
    llm = make_llm(attention_backend="sdpa", enforce_eager=True)
    ids = PROMPTS[2]
    params = [SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=0), SamplingParams()]
    output = llm.generate([{"prompt_token_ids": ids}, {"prompt_token_ids": ids}], params, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    assert [len(position or {}) for position in output.prompt_logprobs] == [0] + [1] * (len(ids) - 1)
