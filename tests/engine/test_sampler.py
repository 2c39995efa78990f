"""A row's token depends on its own logits, parameters, seed and position, and on nothing else."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy.typing as npt
import pytest
import torch

from tests.sampling_cases import VOCAB_SIZE, Row, logits, many_draws, rows, sample, sampling_params
from workers.sampling import GREEDY_PLAN, Sampler, SamplingPlan, SamplingState, compute_logprobs
from workers.sampling.selection import first_argmax, top_k
from workers.sampling_params import MAX_LOGIT_BIAS, SamplingParams

FEW = hypothesis.settings(max_examples=60, deadline=None)


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    values = [0.0] * VOCAB_SIZE
    values[290] = values[130] = values[7] = 2.0
    row = Row(SamplingParams(temperature=0), tuple(values))
    random = Row(SamplingParams(), tuple(values))
    assert sample([row]).token_ids_R.tolist() == [7]
    assert sample([row, random]).token_ids_R[0] == 7


@hypothesis.given(st.lists(rows(), min_size=1, max_size=5), st.integers(0, 3), st.randoms(use_true_random=False))
@FEW
def test_mixed_batch_equals_each_row_alone(batch: list[Row], num_padding: int, random: Any) -> None:
    slots = random.sample(range(9), len(batch))
    together = sample(batch, slots=slots, num_padding=num_padding)
    for index, row in enumerate(batch):
        alone = sample([row])
        assert together.token_ids_R[index] == alone.token_ids_R[0]
        if row.params.logprobs is not None:
            assert together.logprobs is not None
            assert alone.logprobs is not None
            token_id, num_top = int(alone.token_ids_R), row.params.logprobs
            assert together.logprobs.to_lists().position(index, token_id, num_top) == pytest.approx(
                alone.logprobs.to_lists().position(0, token_id, num_top)
            )


@hypothesis.given(st.lists(rows(), min_size=1, max_size=4))
@FEW
def test_cpu_shortcut_equals_device_code(batch: list[Row]) -> None:
    shortcut = sample(batch).token_ids_R
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.sampling.sampler.runs_by_row", lambda _: False)
        assert torch.equal(sample(batch).token_ids_R, shortcut)


@hypothesis.given(rows())
@FEW
def test_a_plan_that_covers_more_gives_the_same_token(row: Row) -> None:
    everything = SamplingPlan(False, True, True, True, VOCAB_SIZE, True, True, False, 20)
    state = SamplingState(1, VOCAB_SIZE, "cpu")
    state.add(0, row.params, row.prompt, row.output, row.eos, row.seed)
    everything = everything._replace(any_penalties=state.plan([0]).any_penalties)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.sampling.sampler.runs_by_row", lambda _: False)
        assert torch.equal(sample([row], plan=everything).token_ids_R, sample([row]).token_ids_R)


@hypothesis.given(sampling_params(), st.lists(logits(), min_size=4, max_size=4), st.integers(0, 3))
@FEW
def test_a_request_goes_on_after_leaving_the_batch(
    params: SamplingParams, steps: list[tuple[float, ...]], pause: int
) -> None:
    """Counts kept on the device equal counts rebuilt from the request's tokens (preemption, resumed streams)."""

    def run(pause_at: int | None) -> list[int]:
        state = SamplingState(3, VOCAB_SIZE, "cpu")
        sampler, slot, output = Sampler(state), 1, list[int]()
        state.add(slot, params, (3, 4, 4), output, (5,), 42)
        for step, values in enumerate(steps):
            if step == pause_at:
                state.remove(slot)
                slot = 2
                state.add(slot, params, (3, 4, 4), output, (5,), 42)
            state.flush()
            token = sampler.sample(
                torch.tensor([values]), torch.tensor([slot]), torch.tensor([step]), state.plan([slot])
            ).token_ids_R
            output.append(int(token))
        return output

    assert run(None) == run(pause)


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("peak", [50.0, 1e4, 1e30])
def test_extremely_peaked_rows_take_the_peak(temperature: float, peak: float) -> None:
    values = [0.0] * VOCAB_SIZE
    values[123] = peak
    cases: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 5}]
    for fields in cases:
        assert set(many_draws(SamplingParams(temperature=temperature, **fields), values, 50).tolist()) == {123}


@pytest.mark.parametrize("fields", [{}, {"top_k": 5}, {"top_p": 0.5}, {"top_p": 0.999999, "min_p": 1e-3}], ids=str)
def test_the_only_token_left_is_taken(fields: dict[str, Any]) -> None:
    values = [-math.inf] * VOCAB_SIZE
    values[VOCAB_SIZE - 1] = -5.0
    assert set(many_draws(SamplingParams(**fields), values, 20).tolist()) == {VOCAB_SIZE - 1}


@pytest.mark.parametrize("value", [-math.inf, math.nan])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_rows_without_any_token_stay_in_range_and_to_themselves(fields: dict[str, Any], value: float) -> None:
    good = Row(SamplingParams(seed=1), tuple(float(i % 7) for i in range(VOCAB_SIZE)))
    bad = Row(SamplingParams(**fields), (value,) * VOCAB_SIZE)
    tokens = sample([bad, good]).token_ids_R
    assert 0 <= tokens[0] < VOCAB_SIZE
    assert tokens[1] == sample([good]).token_ids_R[0]


def test_ties_at_the_edge_are_kept() -> None:
    """Four equally likely tokens: top-k 2 and top-p 0.3 cannot tell them apart, so all may be drawn."""
    values = [2.0, 2.0, 2.0, 2.0, -9.0, -9.0]
    cases: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.3}, {"top_k": 2, "top_p": 0.3}]
    for fields in cases:
        assert set(many_draws(SamplingParams(**fields), values, 200).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("fields", [{"top_k": VOCAB_SIZE}, {"top_k": -1}, {"top_p": 1.0, "top_k": 0}, {"min_p": 0.0}])
def test_parameters_that_keep_everything_need_no_truncation(fields: dict[str, Any]) -> None:
    state = SamplingState(1, VOCAB_SIZE, "cpu")
    state.add(0, SamplingParams(**fields), (), (), (), 0)
    assert not state.plan([0]).truncates


def test_tiny_temperature_is_greedy_as_in_vllm() -> None:
    assert SamplingParams(temperature=1e-6).is_greedy
    state = SamplingState(1, VOCAB_SIZE, "cpu")
    state.add(0, SamplingParams(temperature=1e-6, top_p=0.5, top_k=3), (), (), (), 0)
    assert state.plan([0]) == GREEDY_PLAN


def test_plan_is_the_union_of_the_batch() -> None:
    state = SamplingState(8, 5000, "cpu")
    cases: tuple[dict[str, Any], ...] = (
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2},
        {"top_k": 20},
        {"top_k": 1000},
        {"top_p": 0.5},
        {"min_p": 0.1, "min_tokens": 4},
        {"temperature": 0, "repetition_penalty": 1.1, "logit_bias": {1: 1.0}},
        {"temperature": 0, "min_tokens": 4},
    )
    for slot, fields in enumerate(cases):
        eos = () if slot == 7 else (0,)
        state.add(slot, SamplingParams(**fields), (1,), (), eos, 0)
    plan = SamplingPlan
    assert state.plan([0, 7]) == GREEDY_PLAN  # nothing to mask without stop tokens
    assert state.plan([0, 1]) == plan(num_logprobs=5)
    assert state.plan([0, 2]) == plan(all_greedy=False, any_top_k=True, num_candidates=64)
    assert state.plan([2, 3]) == plan(all_greedy=False, any_top_k=True, num_candidates=1024)
    assert state.plan([2, 4]) == plan(all_greedy=False, any_top_k=True, any_top_p=True, num_candidates=5000)
    assert state.plan([5]) == plan(all_greedy=False, any_min_p=True, any_min_tokens=True)
    assert state.plan([6, state.padding_slot]) == plan(any_logit_bias=True, any_penalties=True)
    assert hash(state.plan(range(7))) == hash(state.plan(range(7)))
    for slot in range(1, 8):
        state.remove(slot)
    assert state.plan([0]) == GREEDY_PLAN


def test_flush_copies_once_per_batch_of_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[int] = []
    original = torch.from_numpy

    def counted(array: npt.NDArray[Any]) -> torch.Tensor:
        transfers.append(len(array))
        return original(array)

    monkeypatch.setattr(torch, "from_numpy", counted)
    state = SamplingState(4, VOCAB_SIZE, "cpu")
    transfers.clear()
    state.flush()
    assert transfers == []
    full = SamplingParams(logit_bias={1: 2.0}, frequency_penalty=1.0, min_tokens=2, stop_token_ids=[3], top_p=0.5)
    for slot in range(3):
        state.add(slot, full, (1, 2), (3,), (4,), slot)
    state.flush()
    assert len(transfers) == 1
    state.remove(1)
    state.flush()
    assert len(transfers) == 1


def test_a_reused_slot_keeps_nothing_of_its_last_request() -> None:
    values = tuple(float(i % 13) for i in range(VOCAB_SIZE))
    first = SamplingParams(
        temperature=0, logit_bias={7: 90.0, 8: 80.0}, presence_penalty=2.0, min_tokens=9, stop_token_ids=[12, 25]
    )
    second = SamplingParams(temperature=0, logit_bias={3: 50.0}, presence_penalty=1.0, min_tokens=9)
    state = SamplingState(2, VOCAB_SIZE, "cpu")
    state.add(0, first, (1, 2), (12, 12), (5,), 1)
    state.flush()
    state.remove(0)
    state.add(0, second, (9,), (), (38,), 2)
    state.flush()
    seen = Sampler(state)
    output = seen.sample(torch.tensor([values]), torch.tensor([0]), torch.tensor([0]), state.plan([0]))
    assert output.token_ids_R.tolist() == sample([Row(second, values, (9,), eos=(38,))]).token_ids_R.tolist() == [3]


def test_as_many_biases_and_stops_as_a_request_may_have() -> None:
    vocab_size = 4000
    bias = dict.fromkeys(range(MAX_LOGIT_BIAS), -50.0) | {MAX_LOGIT_BIAS - 1: 50.0}
    params = SamplingParams(
        temperature=0, logit_bias=bias, min_tokens=1, stop_token_ids=list(range(1024 - 64, 1024)), max_tokens=5
    )
    row = Row(params, (0.0,) * vocab_size, eos=tuple(range(1024, 1024 + 64)))
    assert sample([row]).token_ids_R.tolist() == [1024 + 64]
    late = Row(params, (0.0,) * vocab_size, output=(1,), eos=row.eos)
    assert sample([late]).token_ids_R.tolist() == [MAX_LOGIT_BIAS - 1]


@hypothesis.given(logits(), st.integers(0, VOCAB_SIZE - 1), st.sampled_from((0, 1, 5, 20)))
@FEW
def test_logprobs_equal_log_softmax(values: tuple[float, ...], token_id: int, num_top: int) -> None:
    logits_NV = torch.tensor([values])
    expected_V = logits_NV.double().log_softmax(-1)[0]
    chosen, rank, top_values, top_ids = compute_logprobs(logits_NV, torch.tensor([token_id]), num_top)
    torch.testing.assert_close(chosen[0].double(), expected_V[token_id], rtol=1e-5, atol=1e-4)
    assert rank.tolist() == [1 + sum(other > values[token_id] for other in values)]
    torch.testing.assert_close(top_values[0].double(), expected_V.topk(num_top).values, rtol=1e-5, atol=1e-4)
    assert len(set(top_ids[0].tolist())) == num_top
    torch.testing.assert_close(expected_V[top_ids[0]], top_values[0].double(), rtol=1e-5, atol=1e-4)


def test_logprobs_are_of_the_raw_logits() -> None:
    values = (0.0, 1.0, 2.0, 3.0)
    params = SamplingParams(temperature=0, logit_bias={0: 100.0}, logprobs=2)
    output = sample([Row(params, values)])
    assert output.token_ids_R.tolist() == [0]
    assert output.logprobs is not None
    position = output.logprobs.to_lists().position(0, 0, 2, decode=lambda token_id: f"<{token_id}>")
    expected = torch.tensor(values).log_softmax(-1).tolist()
    assert [(i, entry.rank, entry.decoded_token) for i, entry in position.items()] == [
        (0, 4, "<0>"),
        (3, 1, "<3>"),
        (2, 2, "<2>"),
    ]
    assert [entry.logprob for entry in position.values()] == pytest.approx([expected[0], expected[3], expected[2]])


def test_a_chosen_token_tied_with_the_last_alternative_takes_its_place() -> None:
    lists = compute_logprobs(torch.zeros(1, 8), torch.tensor([6]), 2).to_lists()
    position = lists.position(0, 6, 2)
    assert len(position) == 2
    assert position[6].rank == 1


@hypothesis.given(logits(5000), st.integers(1, 30))
@hypothesis.settings(max_examples=20, deadline=None)
def test_selection_by_blocks_equals_torch(values: tuple[float, ...], k: int) -> None:
    """5000 is 39 blocks and a tail; k up to 30 is on both sides of the switch."""
    x_RV = torch.tensor([values, values[::-1]])
    largest_RK, ids_RK = top_k(x_RV, k)
    assert torch.equal(largest_RK, x_RV.topk(k).values)
    assert torch.equal(x_RV.gather(1, ids_RK), largest_RK)
    assert first_argmax(x_RV).tolist() == [row.tolist().index(max(row.tolist())) for row in x_RV]


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits_RV = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).mul(4).bfloat16()
    state = SamplingState(2, VOCAB_SIZE, "cpu")
    for slot, params in enumerate((SamplingParams(temperature=0, logprobs=1), SamplingParams(top_p=0.9, top_k=50))):
        state.add(slot, params, (), (), (), slot)
    state.flush()
    slots, zeros = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    half = Sampler(state).sample(logits_RV, slots, zeros, state.plan([0, 1]))
    full = Sampler(state).sample(logits_RV.float(), slots, zeros, state.plan([0, 1]))
    assert torch.equal(half.token_ids_R, full.token_ids_R)
    assert half.logprobs is not None
    assert full.logprobs is not None
    assert torch.equal(half.logprobs.chosen_N, full.logprobs.chosen_N)
