"""Products of few rows: the kernels that an engine uses against cuBLAS, by shape and number of rows.

    python -m benchmarks.linear --shape llama-1b llama-8b --rows 1 2 8 16 32 64

Each product runs in a captured graph, one launch after another over weights that do not fit into the cache together.
Gate and up projections are measured with their activation. Microseconds, medians of five; the floor is the weight read
once at the bandwidth of a copy. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.graph_time import time_graph
from benchmarks.offline import copy_bandwidth
from benchmarks.shapes import SHAPES
from workers.kernels import gpu_linear
from workers.kernels.gpu_linear_triton import linear_kernels

#: Bytes of weights that a graph runs over.
_BYTES = 1 << 30


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["llama-1b", "llama-8b"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64])
    args = parser.parse_args()
    gpu_linear.prepare(torch.bfloat16, torch.device("cuda"))
    bandwidth = copy_bandwidth()
    rows = [
        {"shape": shape, "product": product, "rows": num_rows, **_measure(product, *sizes, num_rows, bandwidth)}
        for shape in args.shape
        for product, sizes in _products(shape).items()
        for num_rows in args.rows
    ]
    for row in rows:
        print("{shape} {product} rows {rows}: {ours_us} us, cuBLAS {cublas_us}, floor {floor_us}".format_map(row))
    device = torch.cuda.get_device_name()
    print(json.dumps({"benchmark": "linear", "device": device, "torch": torch.__version__, "rows": rows}))


def _products(shape: str) -> dict[str, tuple[int, int]]:
    """Columns and features of each product of a layer, and of the head; of gate and up both halves' columns."""
    s = SHAPES[shape]
    hidden, inner = s["hidden_size"], s["intermediate_size"]
    heads, kv_heads = s["num_attention_heads"], s["num_key_value_heads"]
    head_dim = s.get("head_dim", hidden // heads)
    return {
        "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
        "o": (hidden, heads * head_dim),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (s["vocab_size"], hidden),
    }


@torch.inference_mode()
def _measure(product: str, columns: int, features: int, num_rows: int, bandwidth: float) -> dict[str, float]:
    count = max(2, min(24, _BYTES // (2 * columns * features)))
    weights = [torch.randn(columns, features, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(count)]
    x = torch.randn(num_rows, features, device="cuda", dtype=torch.bfloat16)
    is_gated = product == "gate_up"
    activate = linear_kernels(torch.bfloat16, torch.cuda.current_device()).silu_and_mul

    def ours(weight: torch.Tensor) -> torch.Tensor:
        if is_gated:
            return gpu_linear.linear_silu_and_mul(x, weight)
        return gpu_linear.linear(x, weight, None)

    def cublas(weight: torch.Tensor) -> torch.Tensor:
        y_MN = F.linear(x, weight)
        return activate(y_MN) if is_gated else y_MN

    def time(product: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return round(time_graph([functools.partial(product, weight) for weight in weights], repeats=5), 2)

    return {
        "ours_us": time(ours),
        "cublas_us": time(cublas),
        "floor_us": round(2 * columns * features / bandwidth * 1e6, 2),
    }


if __name__ == "__main__":
    main()
