"""Passes match what they should, as often as they should, and change no result."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from tests.compile_cases import (
    MixingModel,
    assert_equals_eager,
    compile_decoder,
    compile_mixing,
    plain_decoder,
    tiny_decoder,
    use_plain_forms,
)
from tests.tiny_models import ARCHITECTURE_NAMES
from workers.compile import fused
from workers.compile.errors import CompileError
from workers.compile.passes.manager import GraphPass, PassManager
from workers.compile.passes.noop import NoopElimination, remove_dead
from workers.compile.passes.rope_kv_write import RopeKvWrite
from workers.compile.passes.standard import standard_passes
from workers.compile.plan import OpStep
from workers.kernels import reference

NUM_LAYERS = 3
PASS_NAMES = ["noop_elimination", "rope_kv_write", "qk_rope"]
ROPE_OPS = ("warmgraph::attention", "warmgraph::rope_attention")


@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
def test_every_layer_of_every_architecture_matches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_forms(monkeypatch)
    model = plain_decoder(name)
    compiled = compile_decoder(model, mode="VLLM_COMPILE", piece_format="fx")
    passes = dict(compiled.report.passes)
    assert passes.pop("noop_elimination") > 0
    assert passes == {"rope_kv_write": 0, "qk_rope": NUM_LAYERS}
    assert_equals_eager(model, compiled)


@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
def test_attention_rotates_where_its_backend_wants_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_forms(monkeypatch)
    model = plain_decoder(name)
    compiled = compile_decoder(model, mode="VLLM_COMPILE", piece_format="fx", splitting_ops=ROPE_OPS)
    passes = compiled.report.passes
    assert (passes["rope_kv_write"], passes["qk_rope"]) == (NUM_LAYERS, 0)
    assert compiled.plan is not None
    assert [step.op for step in compiled.plan.steps if isinstance(step, OpStep)] == [ROPE_OPS[1]] * NUM_LAYERS
    assert not any(
        "rms_norm" in op for op in compiled.plan.pieces[compiled.plan.piece_calls()[1]].ops if "add" not in op
    )
    assert compiled.report.num_unique_pieces == 3
    assert_equals_eager(model, compiled)


def test_what_attention_does_not_rotate_is_rotated_before(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_forms(monkeypatch)
    model = plain_decoder("qwen3")
    config = {"mode": "VLLM_COMPILE", "piece_format": "fx", "pass_config": {"rope_kv_write": False}}
    compiled = compile_decoder(model, splitting_ops=ROPE_OPS, **config)
    assert compiled.report.passes["qk_rope"] == NUM_LAYERS
    assert_equals_eager(model, compiled)


def test_native_kernels_leave_nothing_to_fuse() -> None:
    compiled = compile_decoder(tiny_decoder("llama"), mode="VLLM_COMPILE", piece_format="fx")
    assert {name: count for name, count in compiled.report.passes.items() if name != "noop_elimination"} == {
        "rope_kv_write": 0,
        "qk_rope": 0,
    }


@pytest.mark.parametrize("name", PASS_NAMES)
def test_each_pass_can_be_switched_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_forms(monkeypatch)
    model = plain_decoder("qwen3")
    compiled = compile_decoder(model, mode="VLLM_COMPILE", piece_format="fx", pass_config={name: False})
    assert name not in compiled.report.passes
    assert len(compiled.report.passes) == len(PASS_NAMES) - 1
    assert_equals_eager(model, compiled)


def test_an_unknown_pass_is_refused() -> None:
    with pytest.raises(CompileError, match=f"no pass qk_rop; the passes are {', '.join(PASS_NAMES)}"):
        compile_mixing(MixingModel(1), pass_config={"qk_rop": False})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_all_heads_at_once_changes_no_bit(seed: int, has_norms: bool, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    num_tokens, num_kv_heads = rng.choice((1, 2, 7)), rng.randint(1, 4)
    num_heads, head_dim = num_kv_heads * rng.randint(1, 3), 2 * rng.randint(1, 9)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    qkv_TN = normal(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    cache_PD = torch.randn(16, head_dim, generator=generator)
    positions_T = torch.randint(16, (num_tokens,), generator=generator)
    norms = (normal(head_dim), normal(head_dim)) if has_norms else None
    q, k, _ = qkv_TN.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=-1)
    q_THD, k_TKD = q.view(num_tokens, num_heads, head_dim), k.view(num_tokens, num_kv_heads, head_dim)
    if norms is not None:
        q_THD, k_TKD = reference.rms_norm(q_THD, norms[0], 1e-5), reference.rms_norm(k_TKD, norms[1], 1e-5)
    expected = reference.apply_rope(q_THD, k_TKD, positions_T, cache_PD)
    got = fused.rotate_qk(qkv_TN, (num_heads, num_kv_heads, head_dim), positions_T, cache_PD, norms, 1e-5)
    for expected_tensor, got_tensor in zip(expected, got, strict=True):
        torch.testing.assert_close(got_tensor, expected_tensor, atol=0, rtol=0)


class _Scale(GraphPass):
    name: ClassVar[str] = "scale"

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def constants(self) -> dict[str, Any]:
        return {"factor": self._factor}

    def run(self, graph: fx.Graph) -> int:
        return 7


def test_a_pass_is_known_by_its_source_and_constants() -> None:
    assert _Scale(1.0).uuid() == _Scale(1.0).uuid() != _Scale(2.0).uuid()
    assert len({graph_pass.uuid() for graph_pass in (_Scale(1.0), NoopElimination())}) == 2
    assert list(standard_passes().uuids()) == PASS_NAMES
    assert list(standard_passes({"qk_rope": False}).uuids()) == [name for name in PASS_NAMES if name != "qk_rope"]
    assert RopeKvWrite(ROPE_OPS).uuid() != RopeKvWrite(()).uuid()


def test_matches_are_reported_in_order(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert PassManager([_Scale(1.0), NoopElimination()]).run(fx.Graph()) == {"scale": 7, "noop_elimination": 0}
    assert "passes: scale: 7 matches, noop_elimination: 0 matches" in caplog.text


def test_dead_code_with_an_effect_stays() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        _ = x * 2
        x.add_(1)
        torch.ops.aten.copy_.default(x, x)
        return x

    graph = fx.symbolic_trace(function).graph
    assert remove_dead(graph) == 1
    assert [node.target for node in graph.nodes if node.op.startswith("call")] == ["add_", torch.ops.aten.copy_.default]
