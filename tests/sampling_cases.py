"""Building blocks of the sampler's tests: parameters, logits, and one call that samples a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import torch

from workers.sampling import Sampler, SamplerOutput, SamplingPlan, SamplingState
from workers.sampling_params import SamplingParams

#: Not a multiple of the block size, so that rows have a tail.
VOCAB_SIZE = 300


@dataclasses.dataclass(frozen=True)
class Row:
    """One request about to be sampled: everything its token may depend on."""

    params: SamplingParams
    logits: tuple[float, ...]
    prompt: tuple[int, ...] = (1, 2, 2, 3)
    output: tuple[int, ...] = ()
    eos: tuple[int, ...] = (0,)
    seed: int = 7

    @property
    def vocab_size(self) -> int:
        return len(self.logits)


def sample(
    rows: Sequence[Row],
    *,
    slots: Sequence[int] | None = None,
    num_padding: int = 0,
    plan: SamplingPlan | None = None,
    device: str = "cpu",
) -> SamplerOutput:
    """Sample a batch of rows through a fresh state; slots default to 0, 1, 2, ..."""
    slots = range(len(rows)) if slots is None else slots
    state = SamplingState(max(slots) + 1, rows[0].vocab_size, device)
    for row, slot in zip(rows, slots, strict=True):
        state.add(slot, row.params, row.prompt, row.output, row.eos, row.seed)
    state.flush()
    logits = torch.tensor([row.logits for row in rows] + [[0.0] * rows[0].vocab_size] * num_padding)
    all_slots = torch.tensor([*slots, *[state.padding_slot] * num_padding])
    num_output = torch.tensor([len(row.output) for row in rows] + [0] * num_padding)
    return Sampler(state).sample(
        logits.to(device), all_slots.to(device), num_output.to(device), plan or state.plan(slots)
    )


def many_draws(params: SamplingParams, logits: Sequence[float], count: int, seed: int = 0) -> torch.Tensor:
    """The first ``count`` tokens of one seeded request whose logits never change."""
    state = SamplingState(1, len(logits), "cpu")
    state.add(0, params, (), (), (), seed)
    state.flush()
    slots = torch.zeros(count, dtype=torch.int64)
    return (
        Sampler(state)
        .sample(torch.tensor([logits]).expand(count, -1), slots, torch.arange(count), state.plan([0]))
        .token_ids_R
    )


def sampling_params() -> st.SearchStrategy[SamplingParams]:
    """Any mixture of features."""

    def build(**fields: Any) -> SamplingParams:
        return SamplingParams(**{name: value for name, value in fields.items() if value is not None})

    ids = st.integers(0, VOCAB_SIZE - 1)
    return st.builds(
        build,
        temperature=st.sampled_from((0.0, 1e-4, 0.3, 1.0, 3.0)),
        top_k=st.sampled_from((None, 1, 2, 50, 64, 65, VOCAB_SIZE - 1, VOCAB_SIZE, 10**6)),
        top_p=st.sampled_from((None, 1e-8, 0.1, 0.5, 0.9, 0.999)),
        min_p=st.sampled_from((None, 0.01, 0.5, 1.0)),
        repetition_penalty=st.sampled_from((None, 0.5, 1.3)),
        presence_penalty=st.sampled_from((None, -1.0, 2.0)),
        frequency_penalty=st.sampled_from((None, -0.5, 1.5)),
        logit_bias=st.one_of(st.none(), st.dictionaries(ids, st.floats(-100, 100), max_size=5)),
        stop_token_ids=st.one_of(st.none(), st.lists(ids, max_size=3)),
        min_tokens=st.sampled_from((None, 3)),
        logprobs=st.sampled_from((None, 0, 1, 7)),
    )


def logits(vocab_size: int = VOCAB_SIZE) -> st.SearchStrategy[tuple[float, ...]]:
    """Flat to peaked, with the many ties of bf16 and sometimes -inf."""

    def build(seed: int, scale: float, masked: bool) -> tuple[float, ...]:
        values = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)).mul(scale).bfloat16().float()
        if masked:
            values[torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[1:]] = -torch.inf
        return tuple(values.tolist())

    return st.builds(
        build,
        st.integers(0, 2**31),
        st.sampled_from((0.0, 0.01, 1.0, 5.0, 100.0)),
        st.sampled_from((False,) * 5 + (True,)),
    )


def rows() -> st.SearchStrategy[Row]:
    """Any row over ``VOCAB_SIZE`` tokens."""
    ids = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6).map(tuple)
    return st.builds(
        Row,
        params=sampling_params(),
        logits=logits(),
        prompt=ids,
        output=ids,
        eos=st.sampled_from(((), (5,), (5, 9))),
        seed=st.integers(-(2**63), 2**63 - 1),
    )
