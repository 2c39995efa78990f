"""Paged attention on CUDA: every head size, group and dtype against dense float64, eagerly and in captured graphs."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from tests.paged_attention_cases import (
    PagedCase,
    check_rope,
    make_case,
    make_geometry,
    run_case,
    run_last_rows,
    split_heads,
)
from workers.attention.base import AttentionSpec
from workers.attention.triton_kernels.tuning import DecodeTile, PrefillTile, SplitPolicy, default_prefill_tile
from workers.attention.triton_paged import TritonPagedAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

CUDA = torch.device("cuda")

#: (query heads, KV heads, head size, block size, dtype, sliding window)
SHAPES = {
    "llama-1b": (32, 8, 64, 16, torch.bfloat16, None),
    "llama-8b": (32, 8, 128, 16, torch.bfloat16, None),
    "phi-like": (32, 8, 96, 32, torch.bfloat16, None),
    "gemma-like": (16, 8, 256, 64, torch.bfloat16, 1024),
    "smollm": (9, 3, 64, 16, torch.bfloat16, None),
    "qwen-like": (28, 4, 128, 64, torch.bfloat16, None),
    "one-block-per-tile": (32, 8, 64, 64, torch.bfloat16, None),
    "large-blocks": (32, 8, 128, 128, torch.bfloat16, None),
    "half": (32, 8, 64, 16, torch.float16, None),
    "half-window": (32, 8, 128, 16, torch.float16, 100),
    "no-groups": (16, 16, 64, 16, torch.bfloat16, None),
    "pairs": (16, 8, 64, 16, torch.bfloat16, None),
    "fives": (40, 8, 128, 16, torch.bfloat16, None),
    "eights": (64, 8, 128, 16, torch.bfloat16, None),
    "multi-query": (32, 1, 64, 16, torch.bfloat16, None),
}

#: Policies that drive every path: never split, split by the grid, overflow, overflow with chunks that must grow, and
#: launches that overlap the kernel before them.
POLICIES: dict[str, tuple[SplitPolicy, DecodeTile | None]] = {
    "whole": (SplitPolicy(programs_per_sm=0.001, max_chunk=1 << 20), None),
    "fine": (SplitPolicy(programs_per_sm=64.0, min_chunk=64, max_chunk=64, max_programs=16384), None),
    "overflow": (SplitPolicy(programs_per_sm=0.001, max_chunk=64, overflow_chunks=4096), None),
    "scarce": (SplitPolicy(programs_per_sm=1.0, max_chunk=64, overflow_chunks=50), None),
    "overlap": (
        SplitPolicy(programs_per_sm=16.0, min_chunk=64, max_chunk=256),
        DecodeTile(64, 4, 3, overlap_launch=True),
    ),
}


def make_backend(
    shape: str,
    splits: SplitPolicy | None = None,
    decode_tile: DecodeTile | None = None,
    prefill_tile: PrefillTile | None = None,
) -> TritonPagedAttention:
    heads, kv_heads, head_dim, block_size, dtype, window = SHAPES[shape]
    spec = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, block_size, dtype, window)
    return TritonPagedAttention(spec, CUDA, splits=splits, decode_tile=decode_tile, prefill_tile=prefill_tile)


class Backends(dict[str, TritonPagedAttention]):
    """By the name of a shape or a policy."""

    def __missing__(self, name: str) -> TritonPagedAttention:
        shape, options = ("llama-1b", POLICIES[name]) if name in POLICIES else (name, (None, None))
        self[name] = make_backend(shape, *options)
        return self[name]


@pytest.fixture(scope="module")
def backends() -> Backends:
    """Every backend of this file, made when it is first used."""
    return Backends()


def check(backend: TritonPagedAttention, seq_lens: list[int], query_lens: list[int], **options: Any) -> None:
    case = make_case(backend, seq_lens, query_lens, **options)
    run_case(backend, case)
    case.check()


def random_batch(rng: np.random.Generator, num_reqs: int, longest: int) -> tuple[list[int], list[int]]:
    """Contexts of all sizes; decodes, chunks and whole prompts in any order."""
    seq_lens = np.maximum(1, (longest * rng.random(num_reqs) ** 3).astype(int))
    kinds = rng.integers(0, 3, num_reqs)
    chunks = rng.integers(1, np.maximum(seq_lens, 1) + 1)
    query_lens = np.where(kinds == 0, 1, np.where(kinds == 1, chunks, seq_lens))
    return seq_lens.tolist(), query_lens.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_at_boundaries(backends: Backends, shape: str) -> None:
    lengths = [n for edge in (16, 32, 64, 128, 256) for n in (edge - 1, edge, edge + 1, edge + 2)]
    lengths = [1, 2, 3, *lengths, 1000, 1024, 1025]
    check(backends[shape], lengths, [1] * len(lengths))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_reqs", [1, 5, 64])
def test_decode_of_random_lengths(backends: Backends, shape: str, num_reqs: int) -> None:
    rng = np.random.default_rng(num_reqs)
    seq_lens = rng.integers(1, 3000, num_reqs).tolist()
    padded = {"padded_reqs": num_reqs + 3, "padded_tokens": num_reqs + 3, "num_table_columns": 4096 // 16}
    check(backends[shape], seq_lens, [1] * num_reqs, seed=num_reqs, **padded)


@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_batches(backends: Backends, shape: str) -> None:
    rng = np.random.default_rng(11)
    for num_reqs in (1, 2, 17):
        seq_lens, query_lens = random_batch(rng, num_reqs, 1500)
        padded = {"padded_reqs": num_reqs + 2, "padded_tokens": sum(query_lens) + 7}
        check(backends[shape], seq_lens, query_lens, **padded, max_query_len=max(2, *query_lens))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_way_of_splitting(backends: Backends, policy: str) -> None:
    backend = backends[policy]
    for num_reqs, longest in ((1, 9000), (3, 5000), (40, 2000)):
        rng = np.random.default_rng(num_reqs)
        seq_lens = [longest, *rng.integers(1, longest, num_reqs - 1).tolist()]
        check(backend, seq_lens, [1] * num_reqs, seed=num_reqs)
    check(backend, [3000, 40, 500], [1, 40, 1])


def test_more_rows_than_the_workspace_has_slots(backends: Backends) -> None:
    backend = backends["llama-1b"]
    num_reqs = backend.splits.max_programs // 8 + 40
    rng = np.random.default_rng(0)
    check(backend, rng.integers(1, 80, num_reqs).tolist(), [1] * num_reqs)


@pytest.mark.parametrize("policy", ["fine", "overflow"])
def test_results_do_not_vary_between_runs(backends: Backends, policy: str) -> None:
    """Whoever merges last, the order of the sum is the same; a race would show as a difference."""
    backend = backends[policy]
    case = make_case(backend, [4000, 77, 1900], [1, 1, 1])
    run_case(backend, case)
    case.check()
    first = case.out_THD.clone()
    for _ in range(200):
        case.out_THD.fill_(float("nan"))
        run_case(backend, case)
        assert torch.equal(case.out_THD, first)


def test_offsets_beyond_31_bits(backends: Backends) -> None:
    """The same batch at the far end of a cache of more than 2**31 elements."""
    backend = backends["llama-8b"]
    for query_lens in ([1, 1, 1], [1, 40, 33]):
        case = make_case(backend, [300, 40, 65], query_lens)
        num_blocks = case.kv_cache.shape[0]
        offset = 2**31 // case.kv_cache[0].numel() + 5
        huge = torch.empty((offset + num_blocks, *case.kv_cache.shape[1:]), dtype=case.kv_cache.dtype, device=CUDA)
        huge[offset:] = case.kv_cache
        case.kv_cache = huge[offset:]
        geometry = case.geometry
        geometry.block_table_RM[geometry.block_table_RM < num_blocks] += offset
        geometry.slot_mapping_T[geometry.slot_mapping_T >= 0] += offset * backend.spec.block_size
        metadata = backend.build_metadata(geometry)
        backend.forward(case.q_THD, case.k_TKD, case.v_TKD, huge, metadata, case.out_THD)
        case.check()


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("shape", ["llama-1b", "llama-8b", "phi-like", "qwen-like"])
def test_heads_rotated_on_the_way(backends: Backends, shape: str, has_norms: bool) -> None:
    backend = backends[shape]
    check_rope(backend, [1, 2, 300, 1025, 64], [1] * 5, has_norms=has_norms, padded_reqs=8, padded_tokens=8)
    check_rope(backend, [700, 1, 300, 33], [300, 1, 1, 33], has_norms=has_norms, padded_reqs=6, padded_tokens=350)


@pytest.mark.parametrize("is_default", [True, False])
@pytest.mark.parametrize("shape", ["llama-1b", "llama-8b", "half-window", "multi-query"])
def test_the_last_rows_alone(shape: str, is_default: bool) -> None:
    """By the device's own prefill kernel and by that of other devices."""
    backend = make_backend(shape, prefill_tile=None if is_default else default_prefill_tile(SHAPES[shape][2]))
    case = make_case(backend, [2000, 70, 1, 300, 33], [1500, 1, 1, 300, 2], padded_reqs=8, padded_tokens=2000)
    run_last_rows(backend, case)
    case.check_last_rows()
    num_written = case.out_THD[:1500].isfinite().all(-1).all(-1).sum()
    assert 1 <= num_written <= backend.kernels.block_q


@pytest.mark.parametrize("shape", ["llama-1b", "llama-8b"])
def test_the_prefill_kernel_of_other_devices(shape: str) -> None:
    backend = make_backend(shape, prefill_tile=default_prefill_tile(SHAPES[shape][2]))
    rng = np.random.default_rng(3)
    for num_reqs in (1, 7):
        check(backend, *random_batch(rng, num_reqs, 1500))
    check_rope(backend, [700, 1, 300, 33], [300, 1, 1, 33], has_norms=False, padded_reqs=6, padded_tokens=350)


def test_nothing_compiles_after_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    backend = make_backend("pairs")
    assert all(backend.warmup().values())
    compiled: list[object] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **event: compiled.append(event))
    for lengths, query_lens in (([1], [1]), ([16], [16]), ([5, 900, 33], [1, 1, 1]), ([700, 20], [300, 1])):
        check(backend, lengths, query_lens)
    assert not compiled


@dataclasses.dataclass
class Persistent:
    """The runner's buffers: fixed addresses, filled anew each step."""

    rows: int
    tokens: int
    columns: int
    backend: TritonPagedAttention

    def __post_init__(self) -> None:
        spec = self.backend.spec
        width = spec.num_heads + 2 * spec.num_kv_heads
        self.num_blocks = 4096
        self.qkv = torch.zeros(self.tokens, width, spec.head_dim, dtype=spec.dtype, device=CUDA)
        self.out = torch.zeros(self.tokens, spec.num_heads, spec.head_dim, dtype=spec.dtype, device=CUDA)
        self.cache = torch.zeros(self.backend.kv_cache_shape(self.num_blocks), dtype=spec.dtype, device=CUDA)
        rng = np.random.default_rng(0)
        self.padded = {"padded_reqs": self.rows, "padded_tokens": self.tokens, "num_table_columns": self.columns}
        self.geometry, _ = make_geometry([], [], spec.block_size, CUDA, rng, **self.padded, max_query_len=1)

    def capture(self, max_query_len: int) -> torch.cuda.CUDAGraph:
        """Record one layer over padding alone, as the engine does before it has requests."""
        self.geometry.max_query_len = max_query_len
        metadata = self.backend.build_metadata(self.geometry)
        self.backend.warmup()
        graph = torch.cuda.CUDAGraph()
        q, k, v = split_heads(self.qkv, self.backend.spec)
        with torch.cuda.graph(graph):
            self.backend.forward(q, k, v, self.cache, metadata, self.out)
        return graph

    def load(self, case: PagedCase) -> None:
        """Write a step's inputs into the buffers."""
        self.qkv.copy_(torch.cat([case.q_THD, case.k_TKD, case.v_TKD], dim=1))
        self.cache[: case.kv_cache.shape[0]] = case.kv_cache
        self.out.fill_(float("nan"))
        for name in ("query_start_loc", "seq_lens", "block_table_RM", "slot_mapping_T"):
            getattr(self.geometry, name).copy_(getattr(case.geometry, name))

    def check(self, case: PagedCase) -> None:
        """Hold what the replay left against the case's answer."""
        case.out_THD, case.kv_cache = self.out, self.cache[: case.kv_cache.shape[0]]
        case.check()


def replay_batches(
    persistent: Persistent, graph: torch.cuda.CUDAGraph, batches: list[tuple[list[int], list[int]]]
) -> None:
    backend = persistent.backend
    for seed, (seq_lens, query_lens) in enumerate(batches):
        case = make_case(backend, seq_lens, query_lens, seed=seed, **persistent.padded)
        persistent.load(case)
        graph.replay()
        persistent.check(case)


@pytest.mark.parametrize("name", ["llama-1b", "llama-8b", "gemma-like", *POLICIES])
def test_a_captured_decode_serves_any_lengths(backends: Backends, name: str) -> None:
    persistent = Persistent(rows=16, tokens=16, columns=300, backend=backends[name])
    graph = persistent.capture(max_query_len=1)
    rng = np.random.default_rng(3)
    batches = [(rng.integers(1, 2500, n).tolist(), [1] * n) for n in (1, 16, 3, 11)]
    replay_batches(persistent, graph, [*batches, ([4000], [1]), ([1] * 16, [1] * 16)])


@pytest.mark.parametrize("name", ["llama-1b", "gemma-like", "overflow"])
def test_a_captured_mixed_batch_serves_any_batch_that_fits(backends: Backends, name: str) -> None:
    """Whole prompts, chunks, decodes alone: one graph, captured over padding."""
    persistent = Persistent(rows=8, tokens=256, columns=150, backend=backends[name])
    graph = persistent.capture(max_query_len=256)
    batches = [
        ([256], [256]),
        ([1200, 64, 1], [100, 64, 1]),
        ([900, 2, 77, 1100, 5, 9, 300, 33], [1] * 8),
        ([1300, 50, 700, 129], [1, 50, 1, 129]),
        ([1, 1, 200], [1, 1, 200]),
    ]
    replay_batches(persistent, graph, batches)


def test_replay_equals_the_eager_call(backends: Backends) -> None:
    """Same padded shapes, same launches, same bits."""
    backend = backends["llama-1b"]
    persistent = Persistent(rows=8, tokens=8, columns=200, backend=backend)
    graph = persistent.capture(max_query_len=1)
    case = make_case(backend, [2000, 3, 500, 64, 65], [1] * 5, **persistent.padded)
    persistent.load(case)
    graph.replay()
    run_case(backend, case)
    assert torch.equal(persistent.out, case.out_THD)
