"""Every supported architecture gives the logits of transformers, however the tokens are batched."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.paged import CPU, DEVICES, PagedSession
from tests.tiny_models import NAMES, VOCAB_SIZE, reference_model, tiny_checkpoint
from workers.attention.sdpa import SdpaPagedAttention
from workers.graphs.context import ForwardContext, set_forward_context
from workers.model.config import ModelConfig
from workers.model.decoder import DecoderForCausalLM
from workers.model.loader import load_model

BLOCK_SIZE = 8


def load(name: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> DecoderForCausalLM:
    folder = tiny_checkpoint(name)
    return load_model(folder, ModelConfig.from_folder(folder), dtype, device)


def new_session(model: DecoderForCausalLM, device: torch.device = CPU) -> PagedSession:
    return PagedSession(model, SdpaPagedAttention(model.attention_spec(BLOCK_SIZE), device), device=device)


def random_tokens(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


@torch.inference_mode()
def reference_logits(name: str, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = reference_model(name)(torch.tensor([tokens])).logits[0].float()
    return logits


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Tiny models have logits of a few units; 2e-5 of that is a few roundings of fp32.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_one_prefill(name: str) -> None:
    tokens = random_tokens(71, seed=1)
    logits = new_session(load(name)).step({"a": tokens})["a"]
    assert_same(logits, reference_logits(name, tokens))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_token_by_token(name: str) -> None:
    tokens = random_tokens(61, seed=2)
    session = new_session(load(name))
    cuts = [0, 1, 8, 9, 31, 40, *range(41, 62)]
    pieces = [session.step({"a": tokens[start:stop]})["a"] for start, stop in itertools.pairwise(cuts)]
    assert_same(torch.cat(pieces), reference_logits(name, tokens))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_ragged_mixed_batches_with_padding(name: str, device: str) -> None:
    """Requests join at different times, so that decodes, first chunks and later chunks share every step."""
    prompts = {key: random_tokens(length, seed=length) for key, length in zip("abcd", (30, 45, 17, 33), strict=True)}
    on = torch.device(device)
    session = new_session(load(name, device=on), on)
    parts: dict[str, list[torch.Tensor]] = {key: [] for key in prompts}
    done = dict.fromkeys(prompts, 0)
    rng = random.Random(3)
    step = 0
    while any(done[key] < len(prompts[key]) for key in prompts):
        live = [key for number, key in enumerate(prompts) if number <= step and done[key] < len(prompts[key])]
        sizes = {key: 1 if rng.random() < 0.5 else rng.randint(2, 19) for key in live}
        chunks = {key: prompts[key][done[key] : done[key] + sizes[key]] for key in sorted(live, key=sizes.__getitem__)}
        logits = session.step(chunks, num_padding_tokens=rng.randint(0, 3), num_padding_reqs=rng.randint(0, 2))
        for key, chunk in chunks.items():
            parts[key].append(logits[key])
            done[key] += len(chunk)
        step += 1
    for key, tokens in prompts.items():
        assert_same(torch.cat(parts[key]), reference_logits(name, tokens))


def test_decode_only_batch_of_unequal_lengths() -> None:
    session = new_session(load("qwen3"))
    prompts = {key: random_tokens(length, seed=length) for key, length in zip("abc", (1, 16, 25), strict=True)}
    session.step(prompts)
    followers = {key: random_tokens(9, seed=100 + len(tokens)) for key, tokens in prompts.items()}
    for i in range(9):
        logits = session.step(
            {key: followers[key][i : i + 1] for key in prompts}, num_padding_tokens=5, num_padding_reqs=5
        )
        for key, prompt in prompts.items():
            assert_same(logits[key][0], reference_logits("qwen3", prompt + followers[key][: i + 1])[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_rounding(dtype: torch.dtype) -> None:
    tokens = random_tokens(40, seed=4)
    model = load("llama", dtype)
    assert {spec.dtype for spec in model.parameter_specs} == {dtype}
    logits = new_session(model).step({"a": tokens})["a"]
    expected = reference_logits("llama", tokens)
    assert logits.dtype in (dtype, torch.float32)
    error = (logits - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert 0 < error < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_profiling_run_touches_no_cache() -> None:
    model = load("llama")
    backend = SdpaPagedAttention(model.attention_spec(BLOCK_SIZE), CPU)
    with torch.inference_mode(), set_forward_context(ForwardContext(backend, None, [])):
        hidden_TE = model(torch.zeros(7, dtype=torch.int64), torch.arange(7))
    assert hidden_TE.isfinite().all()
    assert hidden_TE.shape == (7, 64)


def test_rotary_table_covers_max_model_len() -> None:
    folder = tiny_checkpoint("llama")
    model = load_model(folder, ModelConfig.from_folder(folder), torch.float32, CPU, max_model_len=33)
    assert model.model.cos_sin_cache.shape == (33, 16)
    tokens = random_tokens(33, seed=5)
    assert_same(new_session(model).step({"a": tokens})["a"], reference_logits("llama", tokens))
