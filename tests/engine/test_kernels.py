"""The native CPU operators against fp64 arithmetic and against their plain forms, and the fallbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from workers.kernels import cpu_ops, functional, reference
from workers.kernels.linear import Linear

DTYPES = [torch.bfloat16, torch.float32]
#: Largest error relative to the largest result: bf16 rounds to 8 bits once, fp32 sums in some order.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["native", "plain"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with the native kernels, once as on a machine without a compiler."""
    if request.param == "plain":
        monkeypatch.setattr(cpu_ops, "library", lambda: None)
    elif not cpu_ops.is_available():
        pytest.skip("the native kernels cannot be built here")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_linear(num_in: int, num_out: int, bias: bool, dtype: torch.dtype) -> tuple[Linear, torch.Tensor]:
    layer = Linear(num_in, num_out, bias, dtype=dtype)
    assert layer.weight is not None
    layer.weight.data.normal_(std=num_in**-0.5)
    if layer.bias is not None:
        layer.bias.data.normal_()
    weight = layer.weight.data.clone()
    layer.finalize()
    return layer, weight


def assert_close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs().max()
    assert error <= TOLERANCE[actual.dtype] * exact.abs().max()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(576, 960), (1536, 576), (64, 32), (65, 33), (48, 100), (9, 7), (1, 1), (31, 500)])
def test_linear(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for bias in (False, True):
        layer, weight = make_linear(*shape, bias, dtype)
        for num_rows in (0, 1, 2, 3, 5, 8, 12, 13, 16, 33, 70, 300):
            x = torch.randn(num_rows, shape[0]).to(dtype)
            exact = F.linear(x.double(), weight.double(), None if layer.bias is None else layer.bias.double())
            if num_rows:
                assert_close(layer(x), exact)
            else:
                assert layer(x).shape == exact.shape


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_at_least_as_accurate_as_torch(dtype: torch.dtype) -> None:
    layer, weight = make_linear(1536, 576, False, dtype)
    x = torch.randn(64, 1536).to(dtype)
    exact = F.linear(x.double(), weight.double())
    ours, theirs = ((y.double() - exact).norm() for y in (layer(x), F.linear(x, weight)))
    assert ours <= (1.01 if dtype is torch.bfloat16 else 8.0) * theirs


@pytest.mark.parametrize("num_rows", [1, 4, 8, 40])
def test_logits_are_not_rounded(num_rows: int) -> None:
    if not cpu_ops.is_available():
        pytest.skip("the native kernels cannot be built here")
    layer, weight = make_linear(576, 1000, True, torch.bfloat16)
    assert layer.bias is not None
    x = torch.randn(num_rows, 576).to(torch.bfloat16)
    logits = layer.logits(x)
    assert logits.dtype is torch.float32
    assert_close(logits, F.linear(x.double(), weight.double(), layer.bias.double()))


@pytest.mark.usefixtures("either_way")
def test_logits_are_the_product() -> None:
    layer, _ = make_linear(64, 96, False, torch.bfloat16)
    x = torch.randn(3, 64).to(torch.bfloat16)
    torch.testing.assert_close(layer.logits(x).to(torch.bfloat16), layer(x))
    assert layer.logits(x).dtype is (torch.bfloat16 if layer.packed_weight is None else torch.float32)


@pytest.mark.usefixtures("either_way")
def test_linear_takes_any_shape_and_stride() -> None:
    layer, weight = make_linear(64, 96, True, torch.float32)
    wide = torch.randn(5, 3, 200)
    for x in (wide[..., :64], wide[1, :, 7:71], wide[0, 0, :64], wide.transpose(0, 2)[:64].permute(1, 2, 0)):
        assert_close(layer(x), F.linear(x.double(), weight.double(), layer.bias.double()))  # type: ignore[union-attr]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 40])
def test_linear_on_any_number_of_threads(num_threads: int, threads: Callable[[int], None]) -> None:
    threads(num_threads)
    layer, weight = make_linear(128, 200, False, torch.bfloat16)
    for num_rows in (1, 9, 65):
        x = torch.randn(num_rows, 128).to(torch.bfloat16)
        assert_close(layer(x), F.linear(x.double(), weight.double()))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(576, 64), (65, 33)])
def test_rows_are_the_weights_own(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer, weight = make_linear(*shape, False, dtype)
    ids = torch.tensor([[0, 5, 5], [31, 32, 7]])
    assert torch.equal(layer.rows(ids), weight[ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_keeps_no_second_copy(dtype: torch.dtype) -> None:
    if not cpu_ops.is_available():
        pytest.skip("the native kernels cannot be built here")
    layer = Linear(64, 96, dtype=dtype)
    assert layer.weight is not None
    address = layer.weight.data_ptr()
    layer.finalize()
    assert layer.weight is None
    assert layer.packed_weight is not None
    assert layer.packed_weight.data_ptr() == address
    layer.finalize()  # does nothing the second time


def test_float16_and_meta_weights_stay_as_they_are() -> None:
    half, meta = Linear(64, 32, dtype=torch.float16), Linear(64, 32, dtype=torch.bfloat16, device="meta")
    for layer in (half, meta):
        layer.finalize()
        assert layer.weight is not None
        assert layer.packed_weight is None
    assert half(torch.zeros(2, 64, dtype=torch.float16)).shape == (2, 32)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 576), (8, 100), (64, 576), (5, 9, 64), (3, 7), (0, 64)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(s).to(dtype) for s in (shape, shape, shape[-1:]))
    total = x + residual
    for y, source in (
        (functional.rms_norm(x, weight, 1e-5), x),
        (functional.add_rms_norm(x, residual, weight, 1e-5)[0], total),
    ):
        exact = source.double()
        exact = exact * (exact.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        if y.numel():
            assert_close(y, exact)
        assert y.shape == x.shape
    assert torch.equal(functional.add_rms_norm(x, residual, weight, 1e-5)[1], total)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_a_slice(dtype: torch.dtype) -> None:
    wide, weight = torch.randn(6, 200).to(dtype), torch.randn(64).to(dtype)
    assert torch.equal(
        functional.rms_norm(wide[:, 10:74], weight, 1e-6), functional.rms_norm(wide[:, 10:74].clone(), weight, 1e-6)
    )
    heads = wide[:, :192].view(6, 3, 64)
    assert torch.equal(functional.rms_norm(heads, weight, 1e-6), functional.rms_norm(heads.clone(), weight, 1e-6))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3072), (40, 3072), (3, 14), (0, 8)])
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = (torch.randn(shape) * 4).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    y = functional.silu_and_mul(gate_up)
    assert y.shape == gate.shape
    if y.numel():
        assert_close(y, F.silu(gate) * up)


def test_silu_of_extreme_values() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -87.0, 0.0, 87.0, 200.0, 1e30])
    y = functional.silu_and_mul(torch.cat((gate, torch.ones(8))))
    torch.testing.assert_close(y, F.silu(gate), rtol=1e-6, atol=1e-35)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 64), (50, 64), (3, 16), (4, 6)])
def test_apply_rope(num_tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    angles = torch.outer(torch.arange(100.0), 1e4 ** -torch.linspace(0, 1, head_dim // 2))
    cache = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.randint(0, 100, (num_tokens,))
    qkv = torch.randn(num_tokens, 5 * head_dim).to(dtype)  # strided, as slices of a fused projection are
    q, k = qkv[:, : 3 * head_dim].view(-1, 3, head_dim), qkv[:, 3 * head_dim :].view(-1, 2, head_dim)
    q_out, k_out = functional.apply_rope(q, k, positions, cache)
    cos, sin = (part.double().repeat(1, 2)[:, None] for part in cache[positions].chunk(2, -1))
    for x, y in ((q, q_out), (k, k_out)):
        first, second = x.double().chunk(2, -1)
        assert_close(y, x.double() * cos + torch.cat((-second, first), -1) * sin)
        assert y.is_contiguous()


def test_nan_is_not_rounded_away() -> None:
    x = torch.full((1, 64), torch.nan, dtype=torch.bfloat16)
    assert functional.rms_norm(x, torch.ones(64, dtype=torch.bfloat16), 1e-5).isnan().all()


def test_native_equals_plain_to_a_rounding() -> None:
    """In bf16 both compute in fp32 and round once, so they may differ in the last bit, seldom."""
    x = torch.randn(64, 576).to(torch.bfloat16)
    weight = torch.randn(576).to(torch.bfloat16)
    native, plain = functional.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)
    assert (native != plain).float().mean() < 0.01
    torch.testing.assert_close(native, plain, rtol=2.0**-7, atol=0)


def test_fakes_have_the_shapes_of_results() -> None:
    """What a compiler sees of each opaque operator."""
    ops = torch.ops.warmgraph
    with FakeTensorMode():
        x, weight = torch.empty(3, 64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bfloat16)
        assert ops.rms_norm(x, weight, 1e-5).shape == (3, 64)
        assert [y.shape for y in ops.add_rms_norm(x, x, weight, 1e-5)] == [(3, 64), (3, 64)]
        assert ops.silu_and_mul(x).shape == (3, 32)
        assert ops.packed_linear(x, torch.empty(32, 64, dtype=torch.bfloat16), None, 20).shape == (3, 20)
        rows = ops.packed_rows(torch.empty(3, dtype=torch.int64), torch.empty(32, 64, dtype=torch.bfloat16), 50)
        assert (rows.shape, rows.dtype) == ((3, 50), torch.bfloat16)
        q = torch.empty(3, 10, 64)[:, :4]
        rotated, _ = ops.apply_rope(q, q, torch.empty(3, dtype=torch.int64), torch.empty(9, 64))
        assert rotated.is_contiguous()
        assert rotated.shape == q.shape
