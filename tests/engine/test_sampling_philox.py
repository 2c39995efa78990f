"""Philox against Random123's known answers, and what the sampler builds on: one number per (seed, index)."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from workers.sampling import philox

#: ``philox4x32 10`` of Random123's kat_vectors: counter, key, result.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.fixture(params=["numpy", "torch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations of the rounds: the CPU's and that of every other device."""
    if request.param == "torch":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.usefixtures("_path")
def test_known_answers() -> None:
    counters = torch.tensor([words(counter) for counter, _, _ in KNOWN_ANSWERS])
    keys = torch.tensor([words(key) for _, key, _ in KNOWN_ANSWERS])
    assert philox.philox_4x32(counters, keys).tolist() == [words(result) for _, _, result in KNOWN_ANSWERS]


@pytest.mark.usefixtures("_path")
def test_uniform_uses_all_bits_of_seed_and_index() -> None:
    seeds = torch.tensor([0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0, 0, 0])
    indices = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2**32, 2**40 + 1])
    numbers = philox.philox_uniform(seeds, indices)
    assert numbers.dtype == torch.float64
    assert len(set(numbers.tolist())) == len(seeds)


@hypothesis.given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31)), min_size=1, max_size=5))
@hypothesis.settings(max_examples=30, deadline=None)
def test_numpy_and_torch_agree_in_any_batch(pairs: list[tuple[int, int]]) -> None:
    seeds, indices = (torch.tensor(column) for column in zip(*pairs, strict=True))
    together = philox.philox_uniform(seeds, indices)
    alone = torch.cat([philox.philox_uniform(seeds[i : i + 1], indices[i : i + 1]) for i in range(len(pairs))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        on_device = philox.philox_uniform(seeds, indices)
    assert torch.equal(together, alone)
    assert torch.equal(together, on_device)


def test_uniform_is_uniform_along_indices_and_along_seeds() -> None:
    count = 100_000
    counting, fixed = torch.arange(count), torch.full((count,), 12345)
    for numbers in (philox.philox_uniform(fixed, counting), philox.philox_uniform(counting, fixed)):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        bins = torch.bincount((numbers * 256).long(), minlength=256).double()
        chi_square = ((bins - count / 256) ** 2 / (count / 256)).sum()
        assert 180 < chi_square < 340  # 255 degrees of freedom: 1e-4 on either side
        correlation = torch.corrcoef(torch.stack((numbers[1:], numbers[:-1])))[0, 1]
        assert correlation.abs() < 0.015
