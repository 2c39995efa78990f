"""Captured graphs in the engine: the same tokens in every mode, on the host backend here and on CUDA under ``gpu``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import tiny_checkpoint
from workers import LLM, SamplingParams
from workers.attention.base import BatchGeometry
from workers.attention.sdpa import SdpaMetadata, SdpaPagedAttention
from workers.errors import ConfigError
from workers.graphs import pacing

PROMPTS = [list(range(3, 3 + length)) for length in (1, 7, 30, 12, 5)]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=7, max_tokens=20, ignore_eos=True, top_k=40),
    SamplingParams(temperature=1.0, seed=8, max_tokens=5, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=17, ignore_eos=True, repetition_penalty=1.3),
    SamplingParams(temperature=0.7, seed=9, max_tokens=9, ignore_eos=True, top_p=0.9),
]


def make_llm(artifacts: dict[str, Any] | None = None, **compilation: Any) -> LLM:
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
        artifacts=artifacts or {},
    )


@pytest.fixture(autouse=True)
def no_captures_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured must not depend on how long a test takes; one test turns them on."""
    monkeypatch.setattr(pacing, "MIN_PAUSE_S", 1e9)


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
    # An engine that runs for longer than the pause between captures also has graphs of other sampling plans.
    assert report.captured["FULL"] >= len(report.graphs)


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
    while llm.engine.runner.use_gap(idle=True):
        pass
    assert llm.engine.runner.graph_report().pending == 0
    assert tokens(llm) == eager_tokens


def test_other_sampling_plans_get_graphs_of_their_own_in_idle_moments(eager_tokens: list[list[int]]) -> None:
    llm = make_llm(cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[4, 8], cudagraph_first_sizes="all")
    runner = llm.engine.runner
    assert tokens(llm) == eager_tokens
    before = {(row.num_tokens, row.num_graphs) for row in runner.graph_report().graphs}
    assert before == {(4, 1), (8, 1)}
    while runner.use_gap(idle=True):
        pass
    after = {row.num_tokens: row.num_graphs for row in runner.graph_report().graphs}
    assert after[8] > 1
    replays = runner.graph_report().replays["FULL"]
    assert tokens(llm) == eager_tokens
    assert runner.graph_report().replays["FULL"] > replays
    assert not runner.use_gap(idle=True)


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


def test_a_second_start_captures_the_sizes_that_the_first_one_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilation: dict[str, Any] = {
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": "auto",
        "cudagraph_num_auto_sizes": 3,
    }
    monkeypatch.setenv("WARMGRAPH_ARTIFACTS", str(tmp_path))
    first = make_llm(**compilation)
    report = first.engine.graph_report()
    assert report.capture_sizes == [1, 2, 4, 8, 16]
    assert report.sizes_from == "the default grid, since no batches are known yet"
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS[:3]]
    params = SamplingParams(temperature=0.0, max_tokens=34, ignore_eos=True)
    for _ in range(4):
        expected = first.generate(prompts, params, use_tqdm=False)
    del first  # saves what it has seen
    second = make_llm(**compilation)
    report = second.engine.graph_report()
    assert report.capture_sizes == [3, 8, 16]
    assert report.sizes_from.startswith("learned from 1")
    again = second.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in again] == [output.outputs[0].token_ids for output in expected]
    assert next(row.num_replays for row in second.engine.graph_report().graphs if row.num_tokens == 3) >= 33


def test_auto_without_a_place_to_remember_warns(caplog: pytest.LogCaptureFixture) -> None:
    make_llm({"store": None}, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes="auto")
    assert "artifacts.store is not set" in caplog.text


def test_a_busy_engine_gets_the_graphs_that_its_batches_miss(
    eager_tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps follow each other without an idle moment; captures come between them and change no token."""
    monkeypatch.setattr(pacing, "MIN_PAUSE_S", 0.0)
    monkeypatch.setattr(pacing, "BUSY_SHARE", 1.0)
    llm = make_llm(
        cudagraph_mode="FULL",
        cudagraph_capture_sizes=[1, 2, 3, 4, 5, 6, 7, 8, 32],
        cudagraph_first_sizes=[8],
        debug_graph_inputs=True,
    )
    assert tokens(llm) == eager_tokens
    report = llm.engine.graph_report()
    assert report.busy_captures > 0
    assert 0 < report.longest_busy_capture_s <= report.busy_capture_seconds
    captured = {row.num_tokens for row in report.graphs if row.state == "captured" and row.uniform}
    assert captured > {8}
    assert report.pending > 0  # sizes that no batch had


#: Sampled with the engine's own seeds, which go by the order of requests.
UNSEEDED = SamplingParams(temperature=1.0, max_tokens=15, ignore_eos=True)
SENTINEL = 12345.0


def run_with_marked_caches(**compilation: Any) -> tuple[list[list[int]], list[torch.Tensor], LLM]:
    """Tokens of unseeded requests, and the KV caches after them, in which everything unwritten is ``SENTINEL``."""
    llm = make_llm(**compilation)
    caches = llm.engine.runner._kv_caches
    with torch.inference_mode():
        for cache in caches:
            cache.fill_(SENTINEL)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    outputs = llm.generate(prompts, UNSEEDED, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs], [cache.clone() for cache in caches], llm


@pytest.fixture
def attention_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as a captured kernel does it: what is written follows from the slots of all rows, since it cannot
    know how many are real, and the rows of padding come out as they will."""
    build, forward = SdpaPagedAttention.build_metadata, SdpaPagedAttention.forward

    def build_metadata(self: SdpaPagedAttention, geometry: BatchGeometry) -> SdpaMetadata:
        rows = torch.nonzero(geometry.slot_mapping_T >= 0).flatten()
        return dataclasses.replace(build(self, geometry), rows=rows, slots=geometry.slot_mapping_T[rows])

    def attend(self: SdpaPagedAttention, *args: Any) -> None:
        forward(self, *args)
        metadata, out_THD = args[-2:]
        out_THD[metadata.num_tokens :] = 100.0

    monkeypatch.setattr(SdpaPagedAttention, "build_metadata", build_metadata)
    monkeypatch.setattr(SdpaPagedAttention, "forward", attend)


@pytest.mark.usefixtures("attention_of_a_gpu")
@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE", "PIECEWISE"])
def test_padding_rows_touch_no_cache_and_no_random_number(mode: str) -> None:
    expected_tokens, expected_caches, _ = run_with_marked_caches(cudagraph_mode="NONE")
    padded_tokens, padded_caches, llm = run_with_marked_caches(
        mode="VLLM_COMPILE",
        piece_format="fx",
        cudagraph_mode=mode,
        cudagraph_capture_sizes=[8, 32],
        cudagraph_first_sizes="all",
    )
    assert llm.engine.graph_report().padded_tokens > 50
    assert padded_tokens == expected_tokens
    for padded, expected in zip(padded_caches, expected_caches, strict=True):
        assert torch.equal(padded == SENTINEL, expected == SENTINEL)
        assert (expected != SENTINEL).any()
        torch.testing.assert_close(padded, expected)


def test_a_memory_limit_leaves_graphs_out_or_refuses_to_start(eager_tokens: list[list[int]]) -> None:
    compilation = {"cudagraph_mode": "FULL", "cudagraph_first_sizes": "all", "cudagraph_memory_limit_bytes": 24_000}
    llm = make_llm(**compilation)
    report = llm.engine.graph_report()
    assert 0 < report.memory_bytes <= 24_000
    assert report.skipped
    assert {row.state for row in report.graphs} == {"captured", "dropped"}
    assert tokens(llm) == eager_tokens
    assert report.captured["FULL"] > 0
    with pytest.raises(ConfigError, match=r"above the limit of .* raise cudagraph_memory_limit_bytes"):
        make_llm(**compilation, cudagraph_memory_policy="error")
