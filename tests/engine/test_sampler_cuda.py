"""Sampling inside a captured CUDA graph: the same tokens as eager, alone and in any batch."""

from __future__ import annotations

import pytest
import torch

from tests.sampling_cases import VOCAB_SIZE, Row, sample
from workers.sampling import Sampler, SamplingState
from workers.sampling.selection import first_argmax
from workers.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu

#: One request per feature, and one with all of them.
PARAMS = (
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.3, top_k=5),
    SamplingParams(top_k=200, top_p=0.7),
    SamplingParams(top_p=0.9, logprobs=3),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=0, repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.5),
    SamplingParams(logit_bias={3: 5.0, 7: -5.0}, min_tokens=4, stop_token_ids=[3, 4]),
    SamplingParams(
        temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, frequency_penalty=1.0, logit_bias={1: 2.0}, min_tokens=2
    ),
)


def batch() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(len(PARAMS), VOCAB_SIZE, generator=generator).mul(3).bfloat16().float()
    return [
        Row(params, tuple(values), output=(4, 5), seed=index)
        for index, (params, values) in enumerate(zip(PARAMS, logits_RV.tolist(), strict=True))
    ]


def test_rows_alone_and_together() -> None:
    rows = batch()
    together = sample(rows, num_padding=3, device="cuda").token_ids_R.tolist()
    alone = [int(sample([row], device="cuda").token_ids_R) for row in rows]
    assert together[: len(rows)] == alone
    on_cpu = sample(rows).token_ids_R.tolist()
    greedy = [index for index, row in enumerate(rows) if row.params.is_greedy]
    assert [alone[index] for index in greedy] == [on_cpu[index] for index in greedy]


@pytest.mark.parametrize("params", [*[[p] for p in PARAMS], list(PARAMS)], ids=lambda p: str(len(p)))
def test_replays_equal_eager_steps(params: list[SamplingParams]) -> None:
    """Ten steps with penalties counted on the device, requests that come and go between replays."""
    num_rows, num_steps = len(params), 10
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(num_rows, VOCAB_SIZE, generator=generator).mul(3) for _ in range(num_steps)]

    def run(captured: bool) -> list[list[int]]:
        state = SamplingState(num_rows, VOCAB_SIZE, "cuda")
        sampler = Sampler(state)
        for slot, p in enumerate(params):
            state.add(slot, p, (1, 2), (), (5,), slot)
        state.flush()
        plan = state.plan(range(num_rows))
        logits_RV = torch.zeros(num_rows, VOCAB_SIZE, device="cuda")
        slots_R = torch.full((num_rows,), state.padding_slot, device="cuda")
        num_output_R = torch.zeros(num_rows, dtype=torch.int64, device="cuda")
        graph = torch.cuda.CUDAGraph()
        if captured:
            sampler.sample(logits_RV, slots_R, num_output_R, plan)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                output = sampler.sample(logits_RV, slots_R, num_output_R, plan)
        slots_R.copy_(torch.arange(num_rows))
        tokens = []
        for index, step in enumerate(steps):
            if index == 5:
                state.remove(0)
                state.add(0, params[0], (9,), (2, 2), (5,), 77)
                state.flush()
            logits_RV.copy_(step)
            num_output_R.fill_(index)
            if captured:
                graph.replay()
            else:
                output = sampler.sample(logits_RV, slots_R, num_output_R, plan)
            tokens.append(output.token_ids_R.tolist())
        return tokens

    assert run(captured=True) == run(captured=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 128256), (3, 50257), (256, 32000), (7, 2048), (5, 100)])
def test_argmax_takes_the_first_of_the_largest(dtype: torch.dtype, num_rows: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x_RV = torch.randn(num_rows, vocab_size, generator=generator).to(dtype)
    x_RV[0] = 0.0  # nothing but ties
    x_RV[-1, vocab_size // 2 :: 7] = 100.0
    if num_rows > 2:
        x_RV[1] = float("-inf")
        x_RV[2, 60:] = float("nan")
    assert first_argmax(x_RV.cuda()).tolist() == x_RV.argmax(dim=-1).tolist()
