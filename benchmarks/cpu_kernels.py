"""Speed of the CPU kernels against plain torch, on the linear layers and attention of one decoder.

Alternatives take turns within one run, because a host drifts by more between runs than they differ; each figure is
the fastest of its turns. Ends in one JSON line.

    python benchmarks/cpu_kernels.py [--threads 2] [--dtype bfloat16] [--rows 1,8,128] [--turns 9]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from workers.attention.base import AttentionBackend, AttentionSpec, BatchGeometry
from workers.attention.cpu import CpuPagedAttention
from workers.attention.sdpa import SdpaPagedAttention
from workers.kernels import cpu_ops
from workers.kernels.linear import Linear

# SmolLM2-135M.
NUM_LAYERS, HIDDEN, INTERMEDIATE, VOCAB = 30, 576, 1536, 49152
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
LAYER_SHAPES = (
    (HIDDEN, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM),
    (NUM_HEADS * HEAD_DIM, HIDDEN),
    (HIDDEN, 2 * INTERMEDIATE),
    (INTERMEDIATE, HIDDEN),
)


def main() -> None:
    """Run everything and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", default="1,2,4,8,16,32,128,512")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    assert cpu_ops.is_available(), "there are no native kernels to measure"
    with torch.inference_mode():
        results = {
            "linear_ms": measure_linears(dtype, [int(rows) for rows in options.rows.split(",")], options.turns),
            "attention_ms": measure_attention(dtype, options.turns),
        }
    environment = {
        "cpu": cpu_name(),
        "threads": options.threads,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
    }
    print(json.dumps({"benchmark": "cpu_kernels", **environment, **results}))


def take_turns(alternatives: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Milliseconds of the fastest turn of each alternative: other processes only ever add."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(turns + 1):
        for name, run in alternatives.items():
            started = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: round(min(values) * 1e3, 3) for name, values in seconds.items()}


def measure_linears(dtype: torch.dtype, rows: Sequence[int], turns: int) -> dict[str, dict[str, float]]:
    """All linear layers of one step; the head, which sees one row per request, on at most 32 rows."""
    shapes = [*LAYER_SHAPES * NUM_LAYERS, (HIDDEN, VOCAB)]
    plain = [torch.randn(n, k).mul_(k**-0.5).to(dtype) for k, n in shapes]
    packed = []
    for (k, n), weight in zip(shapes, plain, strict=True):
        layer = Linear(k, n, dtype=dtype)
        assert layer.weight is not None
        layer.weight.data.copy_(weight)
        layer.finalize()
        packed.append(layer)
    results = {}
    for num_rows in rows:
        inputs = {k: torch.randn(num_rows, k).to(dtype) for k in (HIDDEN, INTERMEDIATE)}

        def x_of(k: int, n: int, inputs: dict[int, torch.Tensor] = inputs) -> torch.Tensor:
            return inputs[k][:32] if n == VOCAB else inputs[k]

        def run_torch(x_of: Callable[[int, int], torch.Tensor] = x_of) -> None:
            for (k, n), weight in zip(shapes, plain, strict=True):
                torch.nn.functional.linear(x_of(k, n), weight)

        def run_native(x_of: Callable[[int, int], torch.Tensor] = x_of) -> None:
            for (k, n), layer in zip(shapes, packed, strict=True):
                layer(x_of(k, n))

        results[str(num_rows)] = take_turns({"torch": run_torch, "native": run_native}, turns)
        print(f"linear {num_rows:5d} rows: {results[str(num_rows)]}", flush=True)
    return results


def measure_attention(dtype: torch.dtype, turns: int) -> dict[str, dict[str, float]]:
    """All layers of one step: name -> (new tokens, context) per request."""
    batches = {
        "decode 1 x 192": [(1, 192)],
        "decode 8 x 192": [(1, 192)] * 8,
        "decode 32 x 192": [(1, 192)] * 32,
        "decode 1 x 4096": [(1, 4096)],
        "prefill 128": [(128, 128)],
        "prefill 1024": [(1024, 1024)],
        "prefill 128 of 2048": [(128, 2048)],
    }
    spec = AttentionSpec(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, BLOCK_SIZE, dtype)
    device = torch.device("cpu")
    results = {}
    for name, requests in batches.items():
        backends = {"sdpa": SdpaPagedAttention(spec, device), "native": CpuPagedAttention(spec, device)}
        results[name] = take_turns(
            {label: attention_step(backend, requests) for label, backend in backends.items()}, turns
        )
        print(f"attention {name}: {results[name]}", flush=True)
    return results


def attention_step(backend: AttentionBackend, requests: Sequence[tuple[int, int]]) -> Callable[[], None]:
    """A function that attends in every layer, over a cache of scattered blocks."""
    spec = backend.spec
    geometry, num_blocks = make_geometry(requests, spec.block_size)
    caches = [torch.randn(backend.kv_cache_shape(num_blocks)).to(spec.dtype) for _ in range(NUM_LAYERS)]
    num_tokens = geometry.num_tokens
    q, k, v = (
        torch.randn(num_tokens, heads, spec.head_dim).to(spec.dtype)
        for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    )
    out = torch.empty_like(q)

    def run() -> None:
        metadata = backend.build_metadata(geometry)
        for cache in caches:
            backend.forward(q, k, v, cache, metadata, out)

    return run


def make_geometry(requests: Sequence[tuple[int, int]], block_size: int) -> tuple[BatchGeometry, int]:
    """The batch's geometry over shuffled blocks, and how many blocks there are."""
    query_lens, seq_lens = np.array(requests, dtype=np.int32).T
    blocks = -(-seq_lens // block_size)
    order = np.random.default_rng(0).permutation(int(blocks.sum())).astype(np.int32)
    table = np.zeros((len(requests), int(blocks.max())), dtype=np.int32)
    slots, start = [], 0
    for row, (query_len, seq_len, num_blocks) in enumerate(zip(query_lens, seq_lens, blocks, strict=True)):
        table[row, :num_blocks] = order[start : start + num_blocks]
        positions = np.arange(seq_len - query_len, seq_len)
        slots.append(table[row, positions // block_size].astype(np.int64) * block_size + positions % block_size)
        start += num_blocks
    starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
    geometry = BatchGeometry(
        num_reqs=len(requests),
        num_tokens=int(query_lens.sum()),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        query_start_loc_cpu=starts,
        seq_lens_cpu=np.ascontiguousarray(seq_lens),
        query_start_loc=torch.from_numpy(starts),
        seq_lens=torch.from_numpy(np.ascontiguousarray(seq_lens)),
        block_table_RM=torch.from_numpy(table),
        slot_mapping_T=torch.from_numpy(np.concatenate(slots)),
    )
    return geometry, int(blocks.sum())


def cpu_name() -> str:
    """The processor's name, where the system tells."""
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
