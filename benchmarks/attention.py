"""Paged attention kernels on a CUDA device: tiles, block sizes, splits, head sizes; achieved bandwidth of the KV read.

    python benchmarks/attention.py [--seconds 85] [--out full.json] [--only tiles,splits,...]

Decode times are per launch inside a CUDA graph of many launches, each over other blocks of a cache several times the
L2; TB/s counts every live key and value once. Kernels are compiled first, in parallel processes. Sections run in order
until the time is up (those left out are named). Prints a table and one JSON line; ``--out`` keeps every measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import triton
from triton.errors import TritonError

from benchmarks.graph_time import time_graph
from workers.attention.base import AttentionSpec, BatchGeometry, Rope
from workers.attention.triton_kernels.tuning import (
    UNLIMITED,
    DecodeTile,
    PrefillTile,
    SplitPlan,
    default_decode_tile,
    default_prefill_tile,
    has_hopper_prefill,
)
from workers.attention.triton_paged import TritonPagedAttention

#: Bytes that one graph reads at least, several times an L2 of 60 MB; and launches it holds at most.
GRAPH_BYTES, GRAPH_LAUNCHES = 400 << 20, 320
POOL_BYTES = 3 << 30
#: Longest context that block tables have room for, unless a load needs more.
MAX_MODEL_LEN = 8192

#: (query heads, KV heads, head size)
SHAPES = {"1b": (32, 8, 64), "8b": (32, 8, 128), "d96": (32, 8, 96), "d256": (16, 8, 256), "mha64": (16, 16, 64)}
BLOCK_SIZES = (16, 32, 64, 128)
#: (batch, context)
LOADS = ((256, 256), (64, 1024), (16, 4096), (8, 256), (1, 256), (1, 8192))
DECODE_TILES: dict[str, list[Any]] = {
    "1b": [
        *[(16, 1, 6), (32, 1, 5), (32, 2, 4), (32, 4, 5), (64, 2, 4), (64, 4, 3), (64, 4, 4), (64, 4, 5)],
        *[(64, 8, 4), (128, 4, 3), (128, 8, 3), (64, 4, 3, 96), (64, 4, 4, 0), (32, 2, 4, 96)],
    ],
    "8b": [
        *[(16, 1, 6), (16, 2, 6), (32, 2, 4), (32, 4, 3), (32, 4, 4), (32, 4, 5), (64, 4, 3), (64, 4, 4)],
        *[(64, 8, 3), (128, 8, 2), (32, 4, 4, 96), (32, 4, 4, 0), (32, 2, 4, 96)],
    ],
    "d96": [(16, 2, 5), (32, 4, 3), (32, 4, 4), (64, 4, 3)],
    "d256": [(16, 2, 4), (16, 4, 4), (16, 4, 6), (32, 4, 3), (32, 8, 3)],
    "mha64": [(32, 2, 4), (64, 4, 3), (64, 4, 4)],
}
PREFILL_TILES: dict[str, list[tuple[int, int, int, int]]] = {
    "1b": [
        *[(64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 4, 2), (128, 128, 8, 2)],
        *[(128, 128, 8, 3), (256, 64, 8, 3)],
    ],
    "8b": [(64, 64, 4, 3), (128, 32, 8, 4), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
    "d256": [(64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2)],
}
#: Of the kernel for Hopper.
HOPPER_TILES: dict[str, list[tuple[int, int, int, int]]] = {
    "1b": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 2), (64, 32, 4, 2)],
    "8b": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2), (64, 32, 4, 2)],
}
#: (requests, new tokens each, cached tokens each)
PREFILLS = ((1, 8192, 0), (8, 1024, 0), (1, 1024, 0), (1, 512, 0), (64, 128, 0), (1, 128, 0), (4, 512, 7680))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One specialisation of the kernels."""

    shape: str
    block_size: int
    decode_tile: DecodeTile
    prefill_tile: PrefillTile

    def backend(self, device: torch.device) -> TritonPagedAttention:
        heads, kv_heads, head_dim = SHAPES[self.shape]
        spec = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, self.block_size, torch.bfloat16)
        return TritonPagedAttention(spec, device, decode_tile=self.decode_tile, prefill_tile=self.prefill_tile)


def variant(
    shape: str, block_size: int = 16, decode: DecodeTile | None = None, prefill: PrefillTile | None = None
) -> Variant:
    head_dim = SHAPES[shape][2]
    if prefill is None:
        is_hopper = has_hopper_prefill(compute_capability(), triton.__version__, head_dim, None)
        prefill = default_prefill_tile(head_dim, hopper=is_hopper)
    return Variant(shape, block_size, decode or default_decode_tile(head_dim), prefill)


@functools.cache
def compute_capability() -> tuple[int, int]:
    """Of the first device, without initialising CUDA."""
    answer = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    major, minor = map(int, answer.stdout.split()[0].split("."))
    return major, minor


# ---------------------------------------------------------------------------------------- compiling ahead


class _OfflineDriver:
    """What Triton asks of a driver in order to compile, answered without one."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_job(job: tuple[Variant, tuple[str, ...], int]) -> None:
    """In a child: put a variant's kernels into Triton's disk cache."""
    from workers.attention.triton_kernels.kernel_set import RopeKind
    from workers.attention.triton_kernels.rope import ROTATE

    one, names, capability = job
    driver: Any = _OfflineDriver(capability)
    triton.runtime.driver.set_active(driver)
    kernels = one.backend(torch.device("cpu")).kernels
    launches = kernels.launches(RopeKind(ROTATE) if names == KERNELS["prefill"] else RopeKind())
    with contextlib.suppress(RuntimeError, TritonError):  # the parent meets the same error, and reports it
        for name in names:
            launches[name].start_compiling()


def compile_ahead(jobs: dict[tuple[Variant, tuple[str, ...]], None]) -> float:
    """Fork before CUDA is initialised; returns seconds."""
    start = time.perf_counter()
    major, minor = compute_capability()
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.map(compile_job, [(*job, 10 * major + minor) for job in jobs], chunksize=1)
    return time.perf_counter() - start


def jobs_ahead(sections: Sequence[str]) -> dict[tuple[Variant, tuple[str, ...]], None]:
    """Every (variant, kernels) that the sections launch."""
    jobs: dict[tuple[Variant, tuple[str, ...]], None] = {}
    for section in sections:
        for one in VARIANTS[section]():
            jobs[one, KERNELS[section]] = None
    return jobs


def tile_variants() -> list[Variant]:
    return [variant(s, b, DecodeTile(*t)) for s in ("1b", "8b") for b in BLOCK_SIZES for t in DECODE_TILES[s]]


def head_variants() -> list[Variant]:
    return [variant(s, b, DecodeTile(*t)) for s in ("d96", "d256", "mha64") for b in (16, 64) for t in DECODE_TILES[s]]


def overlap_variants() -> list[Variant]:
    tile = default_decode_tile(64)
    return [variant("1b", decode=dataclasses.replace(tile, overlap_launch=overlap)) for overlap in (False, True)]


def prefill_variants() -> list[Variant]:
    tiles = {s: [PrefillTile(*t) for t in PREFILL_TILES[s]] for s in ("1b", "8b", "d256")}
    for shape, hopper in HOPPER_TILES.items():
        if has_hopper_prefill(compute_capability(), triton.__version__, SHAPES[shape][2], None):
            tiles[shape] += [PrefillTile(*t, hopper=True) for t in hopper]
    return [variant(s, b, prefill=tile) for s in tiles for b in (16, 64) for tile in tiles[s]]


def default_variants() -> list[Variant]:
    return [variant("1b"), variant("8b")]


VARIANTS: dict[str, Callable[[], list[Variant]]] = {
    "tiles": tile_variants,
    "splits": default_variants,
    "prefill": prefill_variants,
    "host": default_variants,
    "overlap": overlap_variants,
    "skew": default_variants,
    "heads": head_variants,
}
KERNELS: dict[str, tuple[str, ...]] = {
    "tiles": ("decode_uniform",),
    "splits": ("decode_uniform",),
    "prefill": ("cache_write", "prefill"),
    "host": ("cache_write", "prefill", "decode_uniform", "decode_mixed"),
    "overlap": ("decode_uniform",),
    "skew": ("decode_uniform",),
    "heads": ("decode_uniform",),
}


# ---------------------------------------------------------------------------------------- measuring


class Bench:
    """A pool of cache cells, a deadline, and the measurements so far."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.perf_counter() + seconds
        self.device = torch.device("cuda")
        self.pool = torch.randn(POOL_BYTES // 2, dtype=torch.bfloat16, device=self.device)
        self.rng = np.random.default_rng(0)
        self.rows: list[dict[str, Any]] = []
        self._tables: dict[tuple[Any, ...], tuple[torch.Tensor, int]] = {}

    @property
    def is_over(self) -> bool:
        return time.perf_counter() > self.deadline

    def record(self, **row: Any) -> dict[str, Any]:
        self.rows.append(row)
        return row

    def cache(self, backend: TritonPagedAttention) -> torch.Tensor:
        per_block = math.prod(backend.kv_cache_shape(1))
        num_blocks = self.pool.numel() // per_block
        return self.pool[: num_blocks * per_block].view(backend.kv_cache_shape(num_blocks))

    def tables(self, backend: TritonPagedAttention, lens: Sequence[int], columns: int) -> tuple[torch.Tensor, int]:
        """Block tables ``[launches, R, M]`` over scattered blocks, and tokens read by one launch."""
        s = backend.spec
        num_blocks = self.pool.numel() // math.prod(backend.kv_cache_shape(1))
        key = (s.block_size, num_blocks, tuple(lens), columns)
        if key not in self._tables:
            needed = [-(-length // s.block_size) for length in lens]
            bytes_each = sum(lens) * s.num_kv_heads * s.head_dim * 4
            launches = min(max(-(-GRAPH_BYTES // bytes_each), 2), GRAPH_LAUNCHES, num_blocks // sum(needed))
            order = self.rng.permutation(num_blocks)[: launches * sum(needed)].astype(np.int32)
            tables = np.zeros((launches, len(lens), columns), np.int32)
            live = np.arange(columns)[None, :] < np.array(needed)[:, None]
            tables[:, live] = order.reshape(launches, -1)
            self._tables[key] = (torch.from_numpy(tables).to(self.device), sum(lens))
        return self._tables[key]


def split_heads(qkv: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Strided views of a fused projection ``[T, H + 2K, D]``."""
    q_end, k_end = spec.num_heads, spec.num_heads + spec.num_kv_heads
    return qkv[:, :q_end], qkv[:, q_end:k_end], qkv[:, k_end:]


def decode_calls(
    bench: Bench, backend: TritonPagedAttention, lens: Sequence[int], plan: SplitPlan | None = None
) -> tuple[list[Callable[[], None]], float]:
    """Launches of one decode layer each, and the KV bytes of one."""
    s = backend.spec
    columns = -(-max(MAX_MODEL_LEN, *lens) // s.block_size)
    tables, tokens = bench.tables(backend, lens, columns)
    rows = len(lens)
    qkv = torch.randn(rows, s.num_heads + 2 * s.num_kv_heads, s.head_dim, dtype=s.dtype, device=bench.device)
    q, k, v = split_heads(qkv, s)
    out = torch.empty(rows, s.num_heads, s.head_dim, dtype=s.dtype, device=bench.device)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=bench.device)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=bench.device)
    last = (seq_lens - 1).long()
    blocks = tables.gather(2, (last // s.block_size)[None, :, None].expand(len(tables), -1, 1))[..., 0]
    slots = blocks * s.block_size + last % s.block_size
    cache, chosen = bench.cache(backend), plan or backend.split_plan(rows, columns)

    def call(i: int) -> Callable[[], None]:
        table, slot = tables[i], slots[i]
        return lambda: backend.kernels.decode(q, k, v, cache, table, seq_lens, starts, slot, out, chosen, mixed=False)

    return [call(i) for i in range(len(tables))], tokens * s.num_kv_heads * s.head_dim * 4.0


def run_decode(
    bench: Bench, backend: TritonPagedAttention, lens: Sequence[int], plan: SplitPlan | None = None
) -> dict[str, float]:
    calls, num_bytes = decode_calls(bench, backend, lens, plan)
    us = time_graph(calls)
    return {"us": round(us, 2), "tbps": round(num_bytes / us / 1e6, 3)}


def tile_name(tile: DecodeTile | PrefillTile) -> str:
    if isinstance(tile, PrefillTile):
        size = "x".join(map(str, (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages)))
        return f"hopper {size}" if tile.hopper else size
    return f"{tile.block_n}x{tile.num_warps}x{tile.num_stages}r{tile.max_registers}"


def run_tiles(bench: Bench, section: str) -> None:
    for one in VARIANTS[section]():
        if bench.is_over:
            return
        try:
            backend = one.backend(bench.device)
            for batch, context in LOADS:
                result = run_decode(bench, backend, [context] * batch)
                bench.record(
                    section=section, shape=one.shape, block_size=one.block_size, tile=tile_name(one.decode_tile),
                    load=f"{batch}x{context}", **result,
                )  # fmt: skip
        except (RuntimeError, TritonError) as error:  # more registers or shared memory than there are
            bench.record(section=section, shape=one.shape, tile=tile_name(one.decode_tile), error=str(error)[:80])


def run_splits(bench: Bench, section: str) -> None:
    """The policy's choice; then n equal chunks; then one chunk where the grid holds programs that find no work."""
    loads = [(1, 1), (1, 256), (1, 1024), (1, 8192), (8, 256), (8, 2048), (32, 256), (32, 2048), (64, 256), (128, 256)]
    for one in VARIANTS[section]():
        backend = one.backend(bench.device)
        block_n = one.decode_tile.block_n
        for batch, context in [*loads, (256, 256)]:
            plans: dict[str, SplitPlan | None] = {"policy": None}
            for n in (1, 2, 4, 8, 16, 32, 64):
                if n * 8 * batch <= 4096 and n * block_n <= max(context, block_n):
                    plans[str(n)] = SplitPlan(n, 0, block_n, UNLIMITED // n)
            plans |= {f"1of{n}": SplitPlan(n, 0, UNLIMITED // 2, UNLIMITED // n) for n in (2, 4)}
            plans |= {f"1+{n}": SplitPlan(1, -(-n // 8), block_n, 1 << 20) for n in (132, 264)}
            for name, plan in plans.items():
                if bench.is_over:
                    return
                result = run_decode(bench, backend, [context] * batch, plan)
                bench.record(section=section, shape=one.shape, load=f"{batch}x{context}", splits=name, **result)


def run_skew(bench: Bench, section: str) -> None:
    """64 requests of 32 to 1024 tokens, with one of 32768 or not, by longest chunk and number of overflow programs."""
    lens = bench.rng.integers(32, 1024, 64).tolist()
    for one in VARIANTS[section]():
        backend = one.backend(bench.device)
        for name, batch in (("random", lens), ("one long", [*lens[:-1], 32768]), ("all 4096", [4096] * 64)):
            plans: dict[str, SplitPlan | None] = {"policy": None, "whole": SplitPlan(1, 0, 128, UNLIMITED)}
            for chunk in (512, 1024, 2048):
                plans |= {f"{chunk}+{n}": SplitPlan(1, -(-n // 8), 128, chunk) for n in (132, 264, 528)}
            for plan_name, plan in plans.items():
                if bench.is_over:
                    return
                result = run_decode(bench, backend, batch, plan)
                bench.record(section=section, shape=one.shape, load=name, splits=plan_name, **result)


def run_overlap(bench: Bench, section: str) -> None:
    """A small kernel before every decode, as a model has: does the launch hide behind its end?"""
    small = torch.zeros(1 << 16, device=bench.device)
    for one in VARIANTS[section]():
        backend = one.backend(bench.device)
        for batch, context in ((1, 256), (64, 256)):
            calls, _ = decode_calls(bench, backend, [context] * batch)

            def pair(call: Callable[[], None]) -> None:
                small.add_(1.0)
                call()

            us = time_graph([functools.partial(pair, call) for call in calls])
            overlap = one.decode_tile.overlap_launch
            bench.record(section=section, load=f"{batch}x{context}", overlap=overlap, us=round(us, 2))


def mixed_geometry(bench: Bench, backend: TritonPagedAttention, requests: Sequence[tuple[int, int]]) -> BatchGeometry:
    """(new, cached) tokens per request over consecutive blocks."""
    size = backend.spec.block_size
    new, cached = (np.array(column) for column in zip(*requests, strict=True))
    lens = (new + cached).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    columns = -(-int(lens.max()) // size)
    table = np.arange(len(lens) * columns, dtype=np.int32).reshape(len(lens), columns)
    positions = [(r, p) for r in range(len(lens)) for p in range(cached[r], lens[r])]
    slots = np.array([int(table[r, p // size]) * size + p % size for r, p in positions], np.int64)
    on_device = [torch.from_numpy(a).to(bench.device) for a in (starts, lens, table, slots)]
    return BatchGeometry(
        len(lens), int(starts[-1]), int(new.max()), int(lens.max()), starts, lens,
        on_device[0], on_device[1], on_device[2], on_device[3],
    )  # fmt: skip


def run_prefill(bench: Bench, section: str) -> None:
    for one in VARIANTS[section]():
        try:
            backend = one.backend(bench.device)
            for num_reqs, new, cached in PREFILLS:
                if bench.is_over:
                    return
                result = time_prefill(bench, backend, [(new, cached)] * num_reqs)
                bench.record(
                    section=section, shape=one.shape, block_size=one.block_size, tile=tile_name(one.prefill_tile),
                    load=f"{num_reqs}x{new}+{cached}", **result,
                )  # fmt: skip
        except (RuntimeError, TritonError) as error:
            bench.record(section=section, shape=one.shape, tile=tile_name(one.prefill_tile), error=str(error)[:80])
    for shape in ("1b", "8b"):
        bench.record(
            section=section, shape=shape, block_size=0, tile="sdpa", load="1x8192+0", **time_sdpa(bench, shape)
        )


def attention_flops(spec: AttentionSpec, requests: Sequence[tuple[int, int]]) -> float:
    """Two products over the visible keys of every query."""
    pairs = sum(new * cached + new * (new + 1) / 2 for new, cached in requests)
    return 4.0 * pairs * spec.num_heads * spec.head_dim


def time_prefill(bench: Bench, backend: TritonPagedAttention, requests: Sequence[tuple[int, int]]) -> dict[str, float]:
    """With heads rotated on the way, as engines run it."""
    s = backend.spec
    geometry = mixed_geometry(bench, backend, requests)
    shape = (geometry.num_tokens, s.num_heads + 2 * s.num_kv_heads, s.head_dim)
    qkv = torch.randn(shape, dtype=s.dtype, device=bench.device)
    q, k, v = split_heads(qkv, s)
    out = torch.empty(q.shape, dtype=s.dtype, device=bench.device)
    cache = bench.cache(backend)
    positions = [np.arange(cached, cached + new) for new, cached in requests]
    angles = torch.rand(MAX_MODEL_LEN, s.head_dim // 2, device=bench.device)
    rope = Rope(
        torch.from_numpy(np.concatenate(positions)).to(bench.device), torch.cat((angles.cos(), angles.sin()), 1)
    )

    def write() -> None:
        backend.kernels.write_cache(k, v, cache, geometry.slot_mapping_T, out, rope)

    def attend() -> None:
        g = geometry
        backend.kernels.prefill(q, cache, g.block_table_RM, g.seq_lens, g.query_start_loc, out, rope)

    write_us, us = (time_graph([call] * 4, repeats=5) for call in (write, attend))
    return {
        "us": round(us, 1),
        "write_us": round(write_us, 1),
        "tflops": round(attention_flops(s, requests) / us / 1e6, 1),
    }


def time_sdpa(bench: Bench, shape: str) -> dict[str, float]:
    """PyTorch's own flash attention on a contiguous batch of one, for scale."""
    heads, kv_heads, head_dim = SHAPES[shape]
    q = torch.randn(1, heads, 8192, head_dim, dtype=torch.bfloat16, device=bench.device)
    k = torch.randn(1, kv_heads, 8192, head_dim, dtype=torch.bfloat16, device=bench.device)
    us = time_graph([lambda: F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)] * 4, 5)
    spec = AttentionSpec(heads, kv_heads, head_dim, 1.0, 16, torch.bfloat16)
    return {"us": round(us, 1), "tflops": round(attention_flops(spec, [(8192, 0)]) / us / 1e6, 1)}


def run_host(bench: Bench, section: str) -> None:
    """Host microseconds of build_metadata and of one layer's forward, called eagerly."""
    for one in VARIANTS[section]():
        backend = one.backend(bench.device)
        s, cache = backend.spec, bench.cache(backend)
        for name, requests in (("decode", [(1, 200)] * 16), ("mixed", [(1, 200)] * 15 + [(64, 0)])):
            geometry = mixed_geometry(bench, backend, requests)
            shape = (geometry.num_tokens, s.num_heads + 2 * s.num_kv_heads, s.head_dim)
            qkv = torch.randn(shape, dtype=s.dtype, device=bench.device)
            q, k, v = split_heads(qkv, s)
            out, metadata = torch.empty_like(q), backend.build_metadata(geometry)
            forward = host_us(lambda: backend.forward(q, k, v, cache, metadata, out))  # noqa: B023
            build = host_us(lambda: backend.build_metadata(geometry))  # noqa: B023
            bench.record(section=section, shape=one.shape, load=name, forward_us=forward, metadata_us=build)


def host_us(call: Callable[[], object], calls: int = 100, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return round(min(times[1:]), 2)


def copy_tbps(bench: Bench) -> float:
    """The ceiling: a device-to-device copy, bytes read plus bytes written."""
    half = bench.pool.numel() // 2
    us = time_graph([lambda: bench.pool[:half].copy_(bench.pool[half : 2 * half])] * 2)
    return round(half * 4 / us / 1e6, 3)


# ---------------------------------------------------------------------------------------- reporting


def best_tiles(rows: Sequence[dict[str, Any]], unit: str, top: int) -> list[str]:
    """Per shape and block size, the tiles that lose least to the best of each load (geometric mean)."""
    lines, groups = [], sorted({(r["shape"], r["block_size"]) for r in rows if "us" in r and r["block_size"]})
    loads = list(dict.fromkeys(r["load"] for r in rows if "us" in r))
    best = {(s, load): min(r["us"] for r in rows if r.get("load") == load and r["shape"] == s) for s, load in
            {(r["shape"], r["load"]) for r in rows if "us" in r}}  # fmt: skip
    for shape, block_size in groups:
        of_tile: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            if (row["shape"], row.get("block_size")) == (shape, block_size):
                of_tile.setdefault(row["tile"], {})[row["load"]] = row

        def loss(tile: str, shape: str = shape, of_tile: dict[str, dict[str, dict[str, Any]]] = of_tile) -> float:
            ratios = [row["us"] / best[shape, load] for load, row in of_tile[tile].items()]
            return math.exp(statistics.fmean(map(math.log, ratios)))

        for tile in sorted(of_tile, key=loss)[:top]:
            cells = [f"{r['us']:7.1f}us {r[unit]:6.2f}" for load in loads if (r := of_tile[tile].get(load))]
            lines.append(f"{shape:>5} S={block_size:<4}{tile:<13} loss {loss(tile):5.3f} |" + " |".join(cells))
    return [f"{'':35}|" + " |".join(f"{load:>16}" for load in loads), *lines]


def print_tables(bench: Bench) -> None:
    by_section: dict[str, list[dict[str, Any]]] = {}
    for row in bench.rows:
        by_section.setdefault(row["section"], []).append(row)
    for section, rows in by_section.items():
        print(f"\n== {section}")
        if section in ("tiles", "heads"):
            print("\n".join(best_tiles(rows, "tbps", 2)))
        elif section == "prefill":
            print("\n".join(best_tiles([r for r in rows if r["tile"] != "sdpa"], "tflops", 2)))
            print(
                *[f"sdpa {r['shape']}: {r.get('us')} us {r.get('tflops')} TFLOP/s" for r in rows if r["tile"] == "sdpa"]
            )
        elif section in ("splits", "skew"):
            for shape, load in dict.fromkeys((r["shape"], r["load"]) for r in rows):
                cells = [f"{r['splits']}:{r['us']:.1f}" for r in rows if (r["shape"], r["load"]) == (shape, load)]
                print(f"{shape} {load:>9}  " + "  ".join(cells))
        else:
            for row in rows:
                print("  ".join(f"{name}={value}" for name, value in row.items() if name != "section"))
        for row in rows:
            if "error" in row:
                print("left out:", row)


SECTIONS: dict[str, Callable[[Bench, str], None]] = {
    "tiles": run_tiles,
    "splits": run_splits,
    "prefill": run_prefill,
    "host": run_host,
    "overlap": run_overlap,
    "skew": run_skew,
    "heads": run_tiles,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=85.0)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, in order")
    args = parser.parse_args()
    start = time.perf_counter()
    sections = args.only.split(",")
    compile_s = compile_ahead(jobs_ahead(sections))
    bench = Bench(args.seconds - (time.perf_counter() - start))
    summary: dict[str, Any] = {
        "benchmark": "attention",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compile_s": round(compile_s, 1),
        "copy_tbps": copy_tbps(bench),
        "left_out": [],
        "seconds": {},
    }
    for section in sections:
        if bench.is_over:
            summary["left_out"].append(section)
            continue
        began = time.perf_counter()
        with torch.inference_mode():
            SECTIONS[section](bench, section)
        summary["seconds"][section] = round(time.perf_counter() - began, 1)
    print_tables(bench)
    if args.out:
        args.out.write_text(json.dumps({**summary, "rows": bench.rows}) + "\n")
    summary["best"] = best_per_load(bench.rows)
    print(json.dumps(summary))


def best_per_load(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Of every section, shape and load: block size, tile and microseconds of the fastest, and its TB/s or TFLOP/s."""
    best: dict[str, list[Any]] = {}
    for row in rows:
        if "us" not in row or "tile" not in row:
            continue
        key = f"{row['section']} {row['shape']} {row['load']}"
        if key not in best or row["us"] < best[key][2]:
            best[key] = [row["block_size"], row["tile"], row["us"], row.get("tbps", row.get("tflops"))]
    return best


if __name__ == "__main__":
    main()
