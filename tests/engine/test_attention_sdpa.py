"""The reference backend against attention written out in fp64, over random paged batches."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paged import CPU, DEVICES, dense_attention, make_geometry, shuffled_block_tables
from workers.attention.base import AttentionSpec
from workers.attention.sdpa import SdpaPagedAttention

NUM_BLOCKS = 48


def make_spec(
    heads: tuple[int, int], block_size: int, window: int | None, dtype: torch.dtype = torch.float32
) -> AttentionSpec:
    return AttentionSpec(
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=16,
        scale=0.3,
        block_size=block_size,
        dtype=dtype,
        sliding_window=window,
    )


def check_batch(
    spec: AttentionSpec,
    requests: list[tuple[int, int]],
    seed: int,
    padding: tuple[int, int],
    tolerance: float,
    device: torch.device = CPU,
) -> None:
    """Run one batch of (query length, context length) and compare output and cache."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    query_lens, seq_lens = [query for query, _ in requests], [length for _, length in requests]
    tables = shuffled_block_tables(seq_lens, spec.block_size, NUM_BLOCKS, rng)
    geometry = make_geometry(
        query_lens,
        seq_lens,
        tables,
        spec.block_size,
        num_padding_tokens=padding[0],
        num_padding_reqs=padding[1],
        device=device,
    )

    def randn(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, spec.head_dim, generator=generator).to(device, spec.dtype)

    backend = SdpaPagedAttention(spec, device)
    contexts = [(randn(n, spec.num_kv_heads), randn(n, spec.num_kv_heads)) for n in seq_lens]
    cache = torch.full(backend.kv_cache_shape(NUM_BLOCKS), float("nan"), dtype=spec.dtype, device=device)
    for (query_len, seq_len), table, (k_LKD, v_LKD) in zip(requests, tables, contexts, strict=True):
        for position in range(seq_len - query_len):
            cell = cache[:, table[position // spec.block_size], position % spec.block_size]
            cell[0], cell[1] = k_LKD[position], v_LKD[position]
    num_rows = geometry.slot_mapping_T.shape[0]
    q_THD = randn(num_rows, spec.num_heads)
    # As in the model, k and v are strided views of one projection.
    kv_T2KD = randn(2 * num_rows, spec.num_kv_heads).view(num_rows, 2, spec.num_kv_heads, spec.head_dim)
    row = 0
    for (query_len, _), (k_LKD, v_LKD) in zip(requests, contexts, strict=True):
        kv_T2KD[row : row + query_len, 0], kv_T2KD[row : row + query_len, 1] = k_LKD[-query_len:], v_LKD[-query_len:]
        row += query_len
    out_THD = torch.full_like(q_THD, float("nan"))
    before = cache.clone()
    metadata = backend.build_metadata(geometry)
    backend.forward(q_THD, kv_T2KD[:, 0], kv_T2KD[:, 1], cache, metadata, out_THD)

    assert out_THD.isfinite().all()
    row = 0
    for (query_len, _), (k_LKD, v_LKD) in zip(requests, contexts, strict=True):
        rows = slice(row, row + query_len)
        expected = dense_attention(q_THD[rows], k_LKD, v_LKD, spec.scale, spec.sliding_window)
        torch.testing.assert_close(out_THD[rows].double(), expected, rtol=tolerance, atol=tolerance)
        row += query_len
    check_cache(cache, before, geometry.slot_mapping_T, kv_T2KD)


def check_cache(cache: torch.Tensor, before: torch.Tensor, slot_mapping_T: torch.Tensor, kv_T2KD: torch.Tensor) -> None:
    """The mapped slots hold the new keys and values; every other slot is as it was."""
    after, earlier = cache.flatten(1, 2), before.flatten(1, 2)
    written = slot_mapping_T[slot_mapping_T >= 0]
    for row, slot in enumerate(written.tolist()):
        assert torch.equal(after[:, slot], kv_T2KD[row])
    untouched = torch.ones(after.shape[1], dtype=torch.bool, device=cache.device)
    untouched[written] = False
    torch.testing.assert_close(after[:, untouched], earlier[:, untouched], rtol=0, atol=0, equal_nan=True)


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Up to six requests of (query length, context length), in any order."""
    batch = []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 40))
        batch.append((draw(st.one_of(st.just(1), st.integers(1, length))), length))
    return batch


@given(
    batch=requests(),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    block_size=st.sampled_from([1, 5, 8, 16]),
    window=st.sampled_from([None, None, 1, 7, 16, 64]),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_random_batches(
    batch: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    padding: tuple[int, int],
    seed: int,
) -> None:
    budget = NUM_BLOCKS
    fitting = []
    for query_len, seq_len in batch:
        budget -= -(-seq_len // block_size)
        if budget >= 0:
            fitting.append((query_len, seq_len))
    check_batch(make_spec(heads, block_size, window), fitting or [(1, 3)], seed, padding, 2e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("device", DEVICES)
def test_lengths_around_block_boundaries(length: int, window: int | None, device: str) -> None:
    batch = [(1, length), (1, 24), (length, length), (min(3, length), length)]
    check_batch(make_spec((4, 2), 8, window), batch, length, (2, 1), 2e-5, torch.device(device))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("device", DEVICES)
def test_low_precision(dtype: torch.dtype, tolerance: float, device: str) -> None:
    spec = make_spec((4, 2), 8, None, dtype)
    check_batch(spec, [(1, 33), (1, 40), (6, 6), (5, 30)], 0, (1, 1), tolerance, torch.device(device))


def test_padding_slots_within_the_batch_write_nothing() -> None:
    """A warm-up batch has real tokens whose every slot is padding."""
    spec = make_spec((4, 2), 8, None)
    backend = SdpaPagedAttention(spec, CPU)
    geometry = make_geometry([1, 1], [1, 1], [[3], [5]], 8)
    geometry.slot_mapping_T.fill_(-1)
    cache = torch.zeros(backend.kv_cache_shape(8))
    out = torch.full((2, 4, 16), float("nan"))
    kv = torch.randn(2, 2, 16)
    backend.forward(torch.randn(2, 4, 16), kv, kv, cache, backend.build_metadata(geometry), out)
    assert (cache == 0).all()
    assert out.isfinite().all()
