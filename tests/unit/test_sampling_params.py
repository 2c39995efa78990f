"""Defaults are vLLM's, and a wrong value is answered with one sentence that names the parameter."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from workers.errors import InvalidRequestError
from workers.sampling_params import MAX_LOGIT_BIAS, MAX_STOPS, SamplingParams

VLLM_DEFAULTS = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "seed": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert {name: getattr(params, name) for name in VLLM_DEFAULTS} == VLLM_DEFAULTS
    assert params.stop_strings == ()
    assert params.stop_ids == frozenset()


def test_special_values_are_vllms() -> None:
    assert SamplingParams(temperature=1e-6).is_greedy
    assert not SamplingParams(temperature=1e-4).is_greedy
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(logprobs=True).logprobs == 1
    assert SamplingParams(top_k=-1).top_k == -1
    assert SamplingParams(stop="\n").stop_strings == ("\n",)
    assert SamplingParams(stop=[], stop_token_ids=[3, 3]).stop_ids == {3}


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0},
        {"n": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"seed": 2**63},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": 5},
        {"stop": [5]},
        {"stop": ["x"], "detokenize": False},
        {"stop": [str(i) for i in range(MAX_STOPS + 1)]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": "12"},
        {"stop_token_ids": 12},
        {"max_tokens": 0},
        {"min_tokens": 17},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs": False},
        {"prompt_logprobs": 21},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {"5": 0.0}},
        {"logit_bias": {5: 101}},
        {"logit_bias": [5]},
        {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0)},
        {"ignore_eos": "no"},
        {"skip_special_tokens": 1},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_wrong_value_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**fields)
    assert error.value.param == next(iter(fields))
    assert error.value.param in str(error.value)
    assert str(error.value).endswith(".")


def test_unknown_parameters_are_refused() -> None:
    arguments: dict[str, Any] = {"best_of": 2}
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(**arguments)


@pytest.mark.parametrize("fields", [{"logit_bias": {100: 1.0}}, {"stop_token_ids": [3, 100]}], ids=str)
def test_token_ids_outside_the_vocabulary_are_refused(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    params.check_vocabulary(101)
    with pytest.raises(InvalidRequestError, match="token id 100, but this model's vocabulary ends at 99") as error:
        params.check_vocabulary(100)
    assert error.value.param == next(iter(fields))


@pytest.mark.parametrize("seed", [None, 5, 2**63 - 2, -3])
def test_fan_out_gives_every_completion_its_own_seed(seed: int | None) -> None:
    copies = SamplingParams(n=5, seed=seed, top_p=0.5, stop=["a"]).fan_out()
    assert len(copies) == 5
    assert all(copy.n == 1 and copy.top_p == 0.5 and copy.stop_strings == ("a",) for copy in copies)
    seeds = [copy.seed for copy in copies]
    if seed is None:
        assert seeds == [None] * 5
    else:
        assert None not in seeds
        assert len(set(seeds)) == 5


def test_params_cross_processes() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[4], logit_bias={1: 2.0}, seed=3)
    assert pickle.loads(pickle.dumps(params)) == params
