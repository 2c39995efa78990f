# mypy: disable-error-code="no-untyped-def, no-untyped-call, arg-type"
"""Cases for the Triton kernels of attention and of few rows' products on the CPU, in Triton's interpreter.

Run by ``test_attention_triton_interpreted.py`` in a process of its own, with ``TRITON_INTERPRET=1``; not collected by
default. Small tiles, and chunks so short that a few dozen tokens are split.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from tests.paged_attention_cases import check_rope, make_case, run_case, run_last_rows
from workers.attention.base import AttentionSpec
from workers.attention.triton_kernels import kernel_set
from workers.attention.triton_kernels.chunks import find_overflow, overflow_before, overflow_work
from workers.attention.triton_kernels.tuning import DecodeTile, PrefillTile, SplitPolicy
from workers.attention.triton_paged import TritonPagedAttention
from workers.kernels import linear_tuning
from workers.kernels.gpu_linear_triton import LinearKernels


@pytest.fixture(autouse=True)
def _interpreter_with_current_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 turns loop bounds, arrays of one element, into ints with ``int()``, which numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


def make_backend(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 8,
    window: int | None = None,
    dtype: torch.dtype = torch.float16,
    block_n: int = 16,
    splits: SplitPolicy | None = None,
    block_m: int = 32,
) -> TritonPagedAttention:
    spec = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, block_size, dtype, window)
    splits = splits or SplitPolicy(4.0, min_chunk=16, max_chunk=64, max_programs=64, overflow_chunks=32)
    return TritonPagedAttention(
        spec,
        torch.device("cpu"),
        decode_tile=DecodeTile(block_n, 1, 1),
        prefill_tile=PrefillTile(block_m, block_n, 1, 1),
        splits=splits,
        num_sms=4,
    )


def check(backend: TritonPagedAttention, seq_lens: list[int], query_lens: list[int], **options: Any) -> None:
    case = make_case(backend, seq_lens, query_lens, **options)
    run_case(backend, case)
    case.check()
    assert not backend.kernels._counters.any(), "the next step would count arrivals from here"


@pytest.mark.parametrize(
    ("block_size", "block_n", "max_chunk"), [(8, 16, 16), (16, 16, 1024), (32, 16, 32), (16, 32, 32)]
)
def test_decode_at_block_and_tile_boundaries(block_size: int, block_n: int, max_chunk: int) -> None:
    splits = SplitPolicy(6.0, min_chunk=16, max_chunk=max_chunk, max_programs=128, overflow_chunks=64)
    backend = make_backend(2, 1, block_size=block_size, block_n=block_n, splits=splits)
    lengths = [1, 2, 8, 9, 17, 18, 33, 34, 50]
    check(backend, lengths, [1] * len(lengths))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (7, 1), (20, 1)])
def test_group_sizes(heads: int, kv_heads: int) -> None:
    backend = make_backend(heads, kv_heads)
    check(backend, [5, 37], [1, 1])
    check(backend, [5, 20], [5, 9])


def test_a_head_size_that_is_no_power_of_two() -> None:
    backend = make_backend(2, 1, 96)
    check(backend, [40, 3], [1, 1])
    check(backend, [40, 3], [20, 3])


@pytest.mark.parametrize("window", [1, 2, 16, 23])
def test_sliding_window(window: int) -> None:
    backend = make_backend(2, 1, window=window)
    check(backend, [1, 8, 9, 24, 40, 63], [1] * 6)
    check(backend, [40, 1, 30, 24, 17], [40, 1, 1, 7, 2])


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 96)])
def test_heads_rotated_on_the_way(heads: int, kv_heads: int, head_dim: int, has_norms: bool) -> None:
    backend = make_backend(heads, kv_heads, head_dim)
    check_rope(backend, [20, 1, 33, 50], [1] * 4, has_norms=has_norms, padded_reqs=6, padded_tokens=6)
    check_rope(backend, [50, 1, 20, 33], [1, 1, 20, 5], has_norms=has_norms, padded_reqs=5, padded_tokens=30, seed=1)


def test_padding_rows_of_a_decode_are_harmless() -> None:
    backend = make_backend(2, 1)
    check(backend, [20, 9, 33], [1, 1, 1], padded_reqs=8, padded_tokens=8, num_table_columns=20)
    # More tokens than rows, and more rows than tokens.
    check(backend, [20, 9, 33], [1, 1, 1], padded_reqs=3, padded_tokens=8)
    check(backend, [20, 9, 33], [1, 1, 1], padded_reqs=8, padded_tokens=3)


def test_padding_rows_of_a_mixed_batch_are_harmless() -> None:
    backend = make_backend(2, 1)
    check(backend, [20, 9, 33], [1, 9, 4], padded_reqs=8, padded_tokens=32)
    check(backend, [20, 9, 33], [1, 9, 4], padded_reqs=3, padded_tokens=14)


def test_a_batch_of_padding_alone() -> None:
    backend = make_backend(2, 1)
    check(backend, [], [], padded_reqs=4, padded_tokens=4, num_table_columns=4, max_query_len=1)
    check(backend, [], [], padded_reqs=2, padded_tokens=8, num_table_columns=4, max_query_len=8)


def test_decodes_inside_a_mixed_batch() -> None:
    """One-token rows before, between and after prompts; a one-token prompt; a prompt's last single token."""
    backend = make_backend(2, 1)
    check(backend, [50, 1, 20, 45, 33, 12], [1, 1, 20, 1, 5, 1])
    # A mixed launch that turns out to hold decodes only, as a graph's replay may.
    check(backend, [50, 1, 20], [1, 1, 1], max_query_len=2)


def test_long_decodes_overflow_inside_a_mixed_batch() -> None:
    backend = make_backend(
        2, 1, splits=SplitPolicy(0.1, min_chunk=16, max_chunk=16, max_programs=8, overflow_chunks=32)
    )
    check(backend, [50, 20, 63, 2, 33], [1, 20, 1, 1, 2], padded_reqs=7, padded_tokens=30)


def test_chunked_prefill_reads_cached_context() -> None:
    backend = make_backend(2, 1, block_m=16)
    check(backend, [64, 41, 17, 16], [20, 33, 2, 15])


def test_the_last_rows_alone() -> None:
    """Of prompts only the tile with the last token: 8 queries here, of 33, 16 and 2."""
    backend = make_backend(4, 1, block_m=32)
    case = make_case(backend, [41, 1, 16, 9, 20], [33, 1, 16, 2, 1], padded_reqs=7, padded_tokens=60)
    run_last_rows(backend, case)
    case.check_last_rows()
    is_written = case.out_THD.isfinite().all(-1).all(-1)
    assert is_written.nonzero().flatten().tolist() == [32, 33, *range(42, 60)]


def test_more_requests_than_one_search_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_set, "ROW_TILE", 4)
    backend = make_backend(2, 1)
    check(backend, [3, 1, 9, 20, 2, 6], [3, 1, 2, 2, 2, 4], padded_reqs=9, padded_tokens=20)


def test_random_batches() -> None:
    rng = np.random.default_rng(7)
    for seed in range(3):
        num_reqs = int(rng.integers(1, 6))
        seq_lens = rng.integers(1, 60, num_reqs)
        query_lens = np.minimum(np.where(rng.random(num_reqs) < 0.4, 1, rng.integers(1, 40, num_reqs)), seq_lens)
        window = int(rng.integers(1, 40)) if seed % 2 else None
        backend = make_backend(int(rng.integers(1, 5)) * 2, 2, window=window, block_size=int(rng.choice([4, 8, 16])))
        check(backend, seq_lens.tolist(), query_lens.tolist(), seed=seed)


@pytest.mark.parametrize(
    "splits",
    [
        SplitPolicy(4.0, min_chunk=16, max_chunk=16, max_programs=1),  # never split
        SplitPolicy(4.0, min_chunk=16, max_chunk=16, max_programs=16),  # split by the grid
        SplitPolicy(0.1, min_chunk=16, max_chunk=16, max_programs=16, overflow_chunks=16),  # overflow
        SplitPolicy(0.1, min_chunk=16, max_chunk=16, max_programs=16, overflow_chunks=5),  # chunks grow
    ],
)
@pytest.mark.parametrize("row_tile", [2, 256])
def test_a_step_leaves_the_workspace_as_it_found_it(
    splits: SplitPolicy, row_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_set, "ROW_TILE", row_tile)
    backend = make_backend(2, 1, splits=splits)
    case = make_case(backend, [50, 18, 1, 70], [1, 1, 1, 1])
    for _ in range(2):
        case.out_THD.fill_(float("nan"))
        run_case(backend, case)
        case.check()
        assert not backend.kernels._counters.any()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 9, 20, 33, 65])
@pytest.mark.parametrize(("columns", "features"), [(50, 48), (70, 4112), (256, 128)])
def test_products_of_few_rows(
    num_rows: int, columns: int, features: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_tuning, "WIDE_COLUMNS", 256)
    kernels = LinearKernels(torch.float16, overlap=False, num_sms=4)
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, features, generator=generator).half()
    weight = (torch.randn(columns, features, generator=generator) * 0.05).half()
    bias = torch.randn(columns, generator=generator).half() if has_bias else None
    y = kernels.product(x, weight, bias, paired=False)
    few, narrow, wide = num_rows <= 16, num_rows <= 32 and columns <= 4 * 16, num_rows <= 64 and columns == 256
    is_ours = few or narrow or (wide and not has_bias)
    assert (y is not None) is is_ours
    if y is not None:
        expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        assert (y.float() - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("num_rows", [1, 2, 9, 17])
def test_gate_and_up_are_activated(num_rows: int) -> None:
    kernels = LinearKernels(torch.float16, overlap=False, num_sms=4)
    generator = torch.Generator().manual_seed(num_rows)
    x, weight = torch.randn(num_rows, 528, generator=generator).half(), torch.randn(96, 528, generator=generator).half()
    y = kernels.product(x, weight, None, paired=True)
    assert (y is not None) is (num_rows <= 16)
    if y is not None:
        gate, up = F.linear(x.float(), weight.float()).chunk(2, dim=-1)
        expected = F.silu(gate) * up
        assert (y.float() - expected).norm() <= 1e-3 * expected.norm()


@triton.jit
def number_overflow(
    seq_lens_ptr,
    before_ptr,
    row_of_item_ptr,
    summary_ptr,
    num_rows,
    num_splits,
    max_chunk,
    OVERFLOW_CHUNKS: tl.constexpr,
):
    chunk, count = overflow_work(
        num_rows, num_splits, max_chunk, seq_lens_ptr, seq_lens_ptr, 0, 16, False, OVERFLOW_CHUNKS, 2
    )
    tl.store(summary_ptr, chunk)
    tl.store(summary_ptr + 1, count)
    for row in range(num_rows):
        before = overflow_before(
            row, num_rows, num_splits, max_chunk, chunk, seq_lens_ptr, seq_lens_ptr, 0, 16, False, 2
        )
        tl.store(before_ptr + row, before)
    for item in range(count):
        row, before = find_overflow(
            item, num_rows, num_splits, max_chunk, chunk, seq_lens_ptr, seq_lens_ptr, 0, 16, False, 2
        )
        tl.store(row_of_item_ptr + item, row * 100 + before)


@pytest.mark.parametrize("overflow_chunks", [8, 100])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_overflow_chunks_are_numbered_row_by_row(num_splits: int, overflow_chunks: int) -> None:
    """Every program that derives these numbers must agree: whoever writes a slot, and whoever reads it."""
    lengths = [40, 0, 200, 97, 16, 33, 113]  # cached tokens; one more is new
    seq_lens = torch.tensor([length + 1 for length in lengths], dtype=torch.int32)
    before, rows, summary = (torch.full((100,), -1, dtype=torch.int32) for _ in range(3))
    number_overflow[(1,)](seq_lens, before, rows, summary, len(lengths), num_splits, 32, overflow_chunks)
    chunk, count = summary[:2].tolist()
    extra = [max(-(-n // chunk) - num_splits, 0) if n > 32 * num_splits else 0 for n in lengths]
    starts = np.cumsum([0, *extra])
    assert chunk % 16 == 0
    assert chunk >= 32
    assert count == sum(extra) <= overflow_chunks
    assert chunk == 32 or overflow_chunks == 8, "chunks grow only where slots are scarce"
    assert before[: len(lengths)].tolist() == starts[:-1].tolist()
    expected = [row * 100 + int(starts[row]) for row, n in enumerate(extra) for _ in range(n)]
    assert rows[:count].tolist() == expected
