"""The distribution each parameter leaves, against transformers' logits processors and by counting draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as reference

from tests.sampling_cases import Row, many_draws, sample
from workers.sampling import SamplingState
from workers.sampling.sampler import Sampler
from workers.sampling.truncation import integer_weights, keep_threshold
from workers.sampling_params import SamplingParams

VOCAB_SIZE = 1000


def random_logits(seed: int, scale: float = 3.0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def left_by(params: SamplingParams, logits_RV: torch.Tensor) -> torch.Tensor:
    """Probabilities that the device code draws from."""
    state = SamplingState(1, logits_RV.shape[1], "cpu")
    state.add(0, params, (), (), (), 0)
    state.flush()
    rows = state.gather(torch.zeros(len(logits_RV), dtype=torch.int64))
    scaled_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / rows.temperature
    weights_RV = integer_weights(scaled_RV)
    threshold_R1 = keep_threshold(scaled_RV, weights_RV, rows, state.plan([0]))
    weights_RV = weights_RV.masked_fill(scaled_RV < threshold_R1, 0.0)
    return weights_RV / weights_RV.sum(-1, keepdim=True)


def transformers_chain(params: SamplingParams) -> list[Any]:
    """The same parameters as transformers' processors, in vLLM's order."""
    chain: list[Any] = [reference.TemperatureLogitsWarper(params.temperature)]
    if params.min_p:
        chain.append(reference.MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        chain.append(reference.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(reference.TopPLogitsWarper(params.top_p))
    return chain


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 700},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 0.2, "top_k": 900, "top_p": 0.99},
        {"top_p": 0.7, "min_p": 0.2},
    ],
    ids=str,
)
def test_distribution_equals_transformers(fields: dict[str, Any], seed: int) -> None:
    params = SamplingParams(**fields)
    logits_RV = random_logits(seed)
    expected_RV = logits_RV
    for processor in transformers_chain(params):
        expected_RV = processor(torch.zeros(1, 1, dtype=torch.int64), expected_RV)
    kept_RV = left_by(params, logits_RV)
    torch.testing.assert_close(kept_RV.float(), expected_RV.softmax(-1), atol=1e-6, rtol=1e-4)
    # A weight of 0 stands for less than 2**-43 of the most likely token.
    assert torch.equal(kept_RV > 0, expected_RV - expected_RV.amax() > -43 * math.log(2))


PROMPT, OUTPUT = (5, 6, 6, 900), (6, 7, 7, 7, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("fields", "processor"),
    [
        ({"repetition_penalty": 1.7}, reference.RepetitionPenaltyLogitsProcessor(1.7)),
        ({"repetition_penalty": 0.6}, reference.RepetitionPenaltyLogitsProcessor(0.6)),
        (
            {"logit_bias": {3: 2.5, 999: -100.0, 6: 50.0}},
            reference.SequenceBiasLogitsProcessor([[[3], 2.5], [[999], -100.0], [[6], 50.0]]),
        ),
        (
            {"min_tokens": 6, "stop_token_ids": [7, 12]},
            reference.MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, [0, 7, 12], device="cpu"),
        ),
        (
            {"min_tokens": 5, "stop_token_ids": [7, 12]},
            reference.MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, [0, 7, 12], device="cpu"),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_processed_logits_equal_transformers(
    fields: dict[str, Any], processor: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_RV = random_logits(seed)
    expected_RV = processor(torch.tensor([PROMPT + OUTPUT]), logits_RV.clone())
    for by_row in (True, False):
        assert torch.equal(processed(fields, logits_RV, by_row, monkeypatch), expected_RV)


def processed(fields: dict[str, Any], logits_RV: torch.Tensor, by_row: bool, patch: pytest.MonkeyPatch) -> torch.Tensor:
    """What is left of the logits when the choice is made, by the CPU's shortcut or by the device code."""
    state = SamplingState(1, logits_RV.shape[1], "cpu")
    state.add(0, SamplingParams(temperature=0, max_tokens=None, **fields), PROMPT, OUTPUT, (0,), 0)
    state.flush()
    patch.setattr("workers.sampling.sampler.runs_by_row", lambda _: by_row)
    seen: list[torch.Tensor] = []

    def argmax(x_RV: torch.Tensor) -> torch.Tensor:
        seen.append(x_RV)
        return x_RV.argmax(-1)

    patch.setattr("workers.sampling.sampler.first_argmax", argmax)
    Sampler(state).sample(logits_RV, torch.tensor([0]), torch.tensor([len(OUTPUT)]), state.plan([0]))
    return seen[0]


@pytest.mark.parametrize("by_row", [True, False])
def test_frequency_and_presence_penalties_are_openais(by_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_RV = random_logits(0)
    expected_RV = logits_RV.clone()
    for token_id in set(OUTPUT):
        expected_RV[0, token_id] -= 0.5 * OUTPUT.count(token_id) + 1.25
    fields = {"frequency_penalty": 0.5, "presence_penalty": 1.25}
    torch.testing.assert_close(processed(fields, logits_RV, by_row, monkeypatch), expected_RV)


def test_order_is_mask_bias_penalties() -> None:
    """Token 6 is lifted by its bias, then pushed down by the penalty; a masked stop token stays masked."""
    values = [0.0] * 10
    values[6], values[7] = 1.0, 4.5
    params = SamplingParams(
        temperature=0, logit_bias={6: 9.0, 3: 100.0}, repetition_penalty=2.0, min_tokens=4, stop_token_ids=[3]
    )
    row = Row(params, tuple(values), prompt=(6,), eos=())
    assert sample([row]).token_ids_R.tolist() == [6]  # (1 + 9) / 2 = 5 > 4.5; 1 / 2 + 9 would be 9.5
    values[7] = 5.5
    assert sample([Row(params, tuple(values), prompt=(6,), eos=())]).token_ids_R.tolist() == [7]
    late = Row(params, tuple(values), prompt=(6,), output=(1, 1, 1, 1), eos=())
    assert sample([late]).token_ids_R.tolist() == [3]


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    expected = probabilities * counts.sum()
    used = expected > 0
    assert counts[~used].sum() == 0, "a token of probability 0 was drawn"
    statistic = float(((counts - expected)[used] ** 2 / expected[used]).sum())
    return statistic, int(used.sum()) - 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {"logit_bias": {0: 3.0, 1: -3.0}},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(fields: dict[str, Any]) -> None:
    """6000 draws against probabilities computed by transformers; fixed seed, so the outcome is fixed too."""
    logits_RV = random_logits(11, scale=1.0, vocab_size=20)
    params = SamplingParams(**fields)
    expected_RV = logits_RV.double().clone()
    for token_id, bias in (params.logit_bias or {}).items():
        expected_RV[0, token_id] += bias
    for processor in transformers_chain(params):
        expected_RV = processor(torch.zeros(1, 1, dtype=torch.int64), expected_RV)
    tokens = many_draws(params, logits_RV[0].tolist(), 6_000, seed=99)
    counts = torch.bincount(tokens, minlength=20).double()
    statistic, freedom = chi_square(counts, expected_RV.softmax(-1)[0])
    # Wilson-Hilferty: the cube root of chi-square / freedom is nearly normal; 3.3 sigma is one in a thousand.
    spread = 2 / (9 * freedom)
    assert abs((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 3.3


def test_draws_over_a_long_tail_are_not_biased() -> None:
    """50000 equally likely tokens: the mean index and its spread are those of a uniform distribution."""
    tokens = many_draws(SamplingParams(), [0.0] * 50_000, 400).double()
    assert abs(tokens.mean() / 25_000 - 1) < 4 / math.sqrt(3 * 400)
    assert abs(tokens.std() / (50_000 / math.sqrt(12)) - 1) < 0.1
