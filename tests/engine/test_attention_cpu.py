"""The native CPU backend against attention written out in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import paged_attention_cases
from tests.paged_attention_cases import make_case, run_case
from workers.attention.base import AttentionSpec
from workers.attention.cpu import CpuPagedAttention
from workers.errors import ConfigError
from workers.kernels import cpu_ops

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not cpu_ops.is_available(), reason="the native kernels cannot be built here")


@pytest.fixture(autouse=True)
def fp32_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(paged_attention_cases.TOLERANCE, torch.float32, (1e-6, 5e-6))


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def num_threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_backend(
    heads: tuple[int, int] = (9, 3),
    head_dim: int = 64,
    block_size: int = 16,
    window: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> CpuPagedAttention:
    return CpuPagedAttention(AttentionSpec(*heads, head_dim, head_dim**-0.5, block_size, dtype, window), CPU)


DTYPES = [torch.bfloat16, torch.float32]
BATCHES = {
    "one token": ([1], [1]),
    "block boundaries": ([15, 16, 17, 31, 32, 33], [1] * 6),
    "long contexts in parts": ([1, 300, 700, 1200], [1] * 4),
    "whole prompts": ([2, 16, 17, 64, 65, 130], [2, 16, 17, 64, 65, 130]),
    "chunks with cached context": ([40, 100, 513], [7, 64, 65]),
    "decodes and prefills": ([33, 20, 5, 200], [1, 20, 1, 90]),
}


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_dense_attention(batch: str, dtype: torch.dtype, window: int | None) -> None:
    backend = make_backend(dtype=dtype, window=window)
    case = make_case(backend, *BATCHES[batch])
    run_case(backend, case)
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 40, 128])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (24, 1)])
def test_any_head_layout(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    backend = make_backend(heads, head_dim, dtype=dtype)
    case = make_case(backend, [70, 9, 33, 12], [1, 9, 20, 1])
    run_case(backend, case)
    case.check()


@settings(deadline=None, max_examples=40)
@given(
    requests=st.lists(st.tuples(st.integers(1, 150), st.floats(0, 1)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 16, 32]),
    window=st.one_of(st.none(), st.integers(1, 160)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 9)),
    seed=st.integers(0, 1000),
)
def test_any_batch(
    requests: list[tuple[int, float]], block_size: int, window: int | None, padding: tuple[int, int], seed: int
) -> None:
    backend = make_backend((4, 2), 32, block_size, window)
    seq_lens = [length for length, _ in requests]
    query_lens = [max(1, round(length * share)) for length, share in requests]
    case = make_case(
        backend,
        seq_lens,
        query_lens,
        seed,
        padded_reqs=len(seq_lens) + padding[0],
        padded_tokens=sum(query_lens) + padding[1],
    )
    run_case(backend, case)
    case.check()


def test_parts_of_a_long_context_merge_alike_on_any_number_of_threads() -> None:
    backend = make_backend(dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        case = make_case(backend, [5000], [1])
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        run_case(backend, case)
        torch.set_num_threads(before)
        error = case.out_THD.double() - case.expected_THD
        assert error.norm() <= 1e-5 * case.expected_THD.norm()
        results.append(case.out_THD)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    backend = make_backend(dtype=torch.float32)
    case = make_case(backend, [40, 70], [1, 70])
    case.q_THD.mul_(500)  # scores of thousands: all weight on one key
    run_case(backend, case)
    assert case.out_THD.isfinite().all()


def test_refuses_what_it_cannot_compute() -> None:
    with pytest.raises(ConfigError, match="sdpa"):
        make_backend(dtype=torch.float16)


def test_refuses_where_the_kernels_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_ops, "library", lambda: None)
    with pytest.raises(ConfigError, match="native kernels"):
        make_backend()
