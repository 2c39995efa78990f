"""Captured graphs in the engine: the same tokens in every mode, on the host backend here and on CUDA under ``gpu``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny_models import tiny_checkpoint
from workers import LLM, SamplingParams

PROMPTS = [list(range(3, 3 + length)) for length in (1, 7, 30, 12, 5)]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=7, max_tokens=20, ignore_eos=True, top_k=40),
    SamplingParams(temperature=1.0, seed=8, max_tokens=5, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=17, ignore_eos=True, repetition_penalty=1.3),
    SamplingParams(temperature=0.7, seed=9, max_tokens=9, ignore_eos=True, top_p=0.9),
]


def make_llm(**compilation: Any) -> LLM:
    return LLM(
        str(tiny_checkpoint("llama")),
        dtype="float32",
        device="cpu",
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        skip_tokenizer_init=True,
        attention_backend="sdpa",
        compilation_config=compilation,
    )


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], PARAMS, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def eager_tokens() -> list[list[int]]:
    return tokens(make_llm(cudagraph_mode="NONE"))


@pytest.mark.parametrize("mode", ["FULL", "FULL_DECODE_ONLY"])
@pytest.mark.parametrize("sizes", [[1, 2, 4, 8], [3, 5], [8]])
def test_graphs_give_the_tokens_of_eager(mode: str, sizes: list[int], eager_tokens: list[list[int]]) -> None:
    llm = make_llm(
        cudagraph_mode=mode, cudagraph_capture_sizes=sizes, cudagraph_first_sizes="all", debug_graph_inputs=True
    )
    assert tokens(llm) == eager_tokens
    report = llm.engine.runner.graph_report()
    assert report.replays["FULL"] > 0
    assert report.padded_tokens > 0
    assert report.captured["FULL"] == len(report.graphs)


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
def test_pieces_line_up_with_graphs(mode: str, eager_tokens: list[list[int]]) -> None:
    """Every compiled piece is one graph and attention runs between them; three layers make four pieces."""
    llm = make_llm(
        mode="VLLM_COMPILE",
        piece_format="fx",
        cudagraph_mode=mode,
        cudagraph_capture_sizes=[2, 4, 8, 32],
        cudagraph_first_sizes="all",
        debug_graph_inputs=True,
    )
    assert tokens(llm) == eager_tokens
    report = llm.engine.runner.graph_report()
    assert {row.num_graphs for row in report.graphs if row.mode == "PIECEWISE"} == {4}
    assert report.replays["PIECEWISE"] > 0


def test_the_engine_serves_before_all_is_captured(eager_tokens: list[list[int]]) -> None:
    llm = make_llm(
        cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[1, 2, 3, 4, 8], cudagraph_first_sizes=[8]
    )
    assert [row.num_tokens for row in llm.engine.runner.graph_report().graphs if row.state == "captured"] == [8]
    assert tokens(llm) == eager_tokens
    while llm.engine.runner.capture_next_graph():
        pass
    assert llm.engine.runner.graph_report().pending == 0
    assert tokens(llm) == eager_tokens


def test_other_sampling_plans_get_graphs_of_their_own_in_idle_moments(eager_tokens: list[list[int]]) -> None:
    llm = make_llm(cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[4, 8], cudagraph_first_sizes="all")
    runner = llm.engine.runner
    assert tokens(llm) == eager_tokens
    before = {(row.num_tokens, row.num_graphs) for row in runner.graph_report().graphs}
    assert before == {(4, 1), (8, 1)}
    while runner.capture_next_graph():
        pass
    after = {row.num_tokens: row.num_graphs for row in runner.graph_report().graphs}
    assert after[8] > 1
    replays = runner.graph_report().replays["FULL"]
    assert tokens(llm) == eager_tokens
    assert runner.graph_report().replays["FULL"] > replays
    assert not runner.capture_next_graph()


def test_enforce_eager_wins(eager_tokens: list[list[int]]) -> None:
    llm = LLM(
        str(tiny_checkpoint("llama")),
        dtype="float32",
        device="cpu",
        max_model_len=64,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        enforce_eager=True,
        attention_backend="sdpa",
        compilation_config={"cudagraph_mode": "FULL"},
    )
    assert tokens(llm) == eager_tokens
    report = llm.engine.runner.graph_report()
    assert (report.mode, report.mode_reason) == ("NONE", "enforce_eager turns graphs off")
