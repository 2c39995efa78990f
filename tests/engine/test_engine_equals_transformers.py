"""Greedy tokens equal those of transformers (fp32, CPU), however the batch is cut up. The engine's main promise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engine import golden
from tests.tiny_models import NAMES, tiny_checkpoint
from workers import LLM, SamplingParams


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
    }
    return LLM(str(folder), **(defaults | options))


def greedy(llm: LLM, prompts: Sequence[Sequence[int]], num_tokens: int = golden.NUM_TOKENS) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def llm(default_model: Path) -> LLM:
    return make_llm(default_model, max_num_batched_tokens=256)


@pytest.mark.model
@pytest.mark.timeout(900)
class TestDefaultModel:
    """SmolLM2-135M-Instruct, 8 prompts of 64 tokens."""

    def test_alone(self, llm: LLM, default_model: Path) -> None:
        ids = golden.prompt_ids(default_model)
        assert [greedy(llm, [prompt])[0] for prompt in ids] == list(golden.greedy_tokens(default_model))

    def test_all_together(self, llm: LLM, default_model: Path) -> None:
        assert greedy(llm, golden.prompt_ids(default_model)) == list(golden.greedy_tokens(default_model))

    def test_prefix_cache_hot(self, llm: LLM, default_model: Path) -> None:
        before = llm.engine.stats().scheduler.num_prefix_hit_tokens
        assert greedy(llm, golden.prompt_ids(default_model)) == list(golden.greedy_tokens(default_model))
        assert llm.engine.stats().scheduler.num_prefix_hit_tokens > before

    def test_chunked_prefill(self, default_model: Path) -> None:
        llm = make_llm(default_model, max_num_batched_tokens=16)
        assert greedy(llm, golden.prompt_ids(default_model)) == list(golden.greedy_tokens(default_model))

    def test_preemption(self, default_model: Path) -> None:
        llm = make_llm(default_model, num_gpu_blocks_override=18, max_num_batched_tokens=64)
        assert greedy(llm, golden.prompt_ids(default_model)) == list(golden.greedy_tokens(default_model))
        assert llm.engine.stats().scheduler.num_preemptions > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str) -> None:
    folder = tiny_checkpoint(name)
    prompts = [tuple(range(3, 3 + length)) for length in (1, 5, 16, 33)]
    expected = [golden.greedy(folder, ids, 16) for ids in prompts]
    assert greedy(make_llm(folder, max_model_len=64), prompts, 16) == expected
    assert greedy(make_llm(folder, max_model_len=64, max_num_batched_tokens=8), prompts, 16) == expected
    few_blocks = make_llm(folder, max_model_len=64, num_gpu_blocks_override=6, enable_prefix_caching=False)
    assert greedy(few_blocks, prompts, 16) == expected
