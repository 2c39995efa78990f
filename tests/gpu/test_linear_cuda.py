"""Products of few rows on a CUDA device: right for every number of rows, shape and dtype that they take."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from workers.kernels import gpu_linear
from workers.kernels.linear import Linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _kernels() -> None:
    gpu_linear.prepare(torch.bfloat16, CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 16, 17, 32, 33, 64, 65])
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(2048, 3072), (2048, 2048), (8192, 2048), (4096, 4096), (576, 49152), (128, 40001), (1536, 577), (48, 100)],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_is_at_least_as_accurate_as_torch(
    dtype: torch.dtype, num_rows: int, in_features: int, out_features: int, has_bias: bool
) -> None:
    torch.manual_seed(num_rows)
    x = torch.randn(num_rows, in_features, device=CUDA).to(dtype)
    weight = (torch.randn(out_features, in_features, device=CUDA) * 0.05).to(dtype)
    bias = torch.randn(out_features, device=CUDA).to(dtype) if has_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    ours = relative_error(torch.ops.warmgraph.linear(x, weight, bias), exact)
    theirs = relative_error(F.linear(x, weight, bias), exact)
    assert ours <= 1.05 * theirs


@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 100])
@pytest.mark.parametrize(("in_features", "inner"), [(2048, 8192), (576, 1536), (128, 1008), (128, 1000)])
def test_gate_and_up_are_activated(num_rows: int, in_features: int, inner: int) -> None:
    x = torch.randn(num_rows, in_features, device=CUDA).bfloat16()
    weight = (torch.randn(2 * inner, in_features, device=CUDA) * 0.05).bfloat16()
    gate, up = F.linear(x.double(), weight.double()).chunk(2, -1)
    y = torch.ops.warmgraph.linear_silu_and_mul(x, weight)
    assert y.shape == (num_rows, inner)
    assert relative_error(y, F.silu(gate) * up) < 6e-3


@pytest.mark.parametrize("num_rows", [1, 5, 16, 20])
def test_captured_products_replay_with_new_inputs(num_rows: int) -> None:
    """The launch that overlaps the kernel before it waits for that kernel's result, in a graph too."""
    layers = [Linear(1024, 1024, dtype=torch.bfloat16, device=CUDA) for _ in range(6)]
    for layer in layers:
        assert layer.weight is not None
        layer.weight.data.normal_(std=0.03)
    x = torch.randn(num_rows, 1024, device=CUDA).bfloat16()

    def run(value: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            value = layer(value * 1.5)
        return value

    with torch.inference_mode():
        run(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(x)
        for seed in range(20):
            x.copy_(torch.randn(num_rows, 1024, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(captured, run(x))
