"""Plans are data: they survive JSON, say what does not fit, and run in the order they say."""

from __future__ import annotations

import dataclasses

import pytest

from workers.compile.errors import PlanMismatchError
from workers.compile.plan import PLAN_VERSION, Build, InputSpec, OpStep, PieceRecord, PieceStep, Plan, TensorSpec

WEIGHTS = [
    TensorSpec("layers.0.weight", "torch.float32", (4, 8), (8, 1)),
    TensorSpec("layers.1.weight", "torch.float32", (4, 8), (8, 1)),
]


INPUTS = [InputSpec("float32", "cpu", ("n0", 8), (8, 1)), InputSpec("float32", "cpu", (4, 8), (8, 1))]


def make_plan() -> Plan:
    return Plan(
        factors={"torch": "2.13", "dynamic_dims": {"x": 0}},
        arguments=[TensorSpec("x", "torch.float32", ("n0", 8))],
        dynamic_dims=[0],
        weights=list(WEIGHTS),
        steps=[
            PieceStep("first", ["a0", "w0"], ["v0", "v1"]),
            OpStep("test::op", ["v0", "v1", {"const": 3}], {"scale": {"const": 0.5}}),
            PieceStep("last", ["v1", "w1"], ["v2"]),
        ],
        results=["v2"],
        returns_tuple=False,
        pieces={
            "first": PieceRecord(
                {"linear": 1}, INPUTS, [Build("fx", None, "aa", 2, 0.1), Build("fx", 4, "bb", 2, 0.1)]
            ),
            "last": PieceRecord(
                {"add": 2}, INPUTS, [Build("fx", None, "cc", 2, 0.1), Build("aoti", None, "dd", 2, 9.0)]
            ),
        },
        passes={"noop_elimination": 3},
        trace_seconds=0.5,
    )


def test_a_plan_survives_json() -> None:
    assert Plan.from_json(make_plan().to_json()) == make_plan()


def test_order_survives_json() -> None:
    """Passes run in an order, pieces are called in one, and the most frequent operation comes first."""
    plan = make_plan()
    plan.passes = {"noop_elimination": 3, "rope_kv_write": 2, "qk_rope": 0, "another": 1}
    plan.pieces = {key: plan.pieces[key] for key in ("last", "first")}
    plan.pieces["first"].ops = {"mul": 5, "add": 2, "linear": 1, "cat": 1}
    read = Plan.from_json(plan.to_json())
    assert list(read.passes.items()) == list(plan.passes.items())
    assert list(read.pieces) == ["last", "first"]
    assert list(read.pieces["first"].ops) == ["mul", "add", "linear", "cat"]


def test_equal_factors_make_equal_text() -> None:
    plan, other = make_plan(), make_plan()
    other.factors = dict(reversed(plan.factors.items()))
    assert plan.to_json() == other.to_json()


def test_a_format_counts_only_if_every_piece_has_it() -> None:
    plan = make_plan()
    assert plan.formats() == ["fx"]
    assert plan.formats(size=4) == []
    assert plan.piece_calls() == ["first", "last"]
    assert plan.sizes() == [None, 4]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        f'{{"version": {PLAN_VERSION}}}',
        make_plan().to_json()[:-10],
        make_plan().to_json().replace("arg", "arx"),
    ],
)
def test_a_damaged_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanMismatchError, match="damaged"):
        Plan.from_json(text)


def test_a_plan_of_another_version_is_refused() -> None:
    text = make_plan().to_json().replace(f'"version": {PLAN_VERSION}', f'"version": {PLAN_VERSION + 1}')
    with pytest.raises(PlanMismatchError, match=f"version {PLAN_VERSION + 1}, and this code reads {PLAN_VERSION}"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (4, 9)}, r"layers.1.weight has shape \[4, 9\], not \[4, 8\]"),
        ({"dtype": "torch.bfloat16"}, "layers.1.weight has dtype torch.bfloat16, not torch.float32"),
        ({"stride": (1, 4)}, r"layers.1.weight has stride \[1, 4\], not \[8, 1\]"),
        ({"name": "layers.2.weight"}, "layers.1.weight is missing"),
    ],
)
def test_other_weights_are_refused_by_name(change: dict[str, object], message: str) -> None:
    live = [WEIGHTS[0], dataclasses.replace(WEIGHTS[1], **change)]  # type: ignore[arg-type]
    with pytest.raises(PlanMismatchError, match=message):
        make_plan().check_weights({spec.name: spec for spec in live})


def test_weights_that_the_model_has_besides_do_not_matter() -> None:
    head = TensorSpec("lm_head.weight", "torch.float32", (16, 8), (8, 1))
    make_plan().check_weights({spec.name: spec for spec in [*WEIGHTS, head]})


def test_only_the_first_problems_are_listed() -> None:
    plan = make_plan()
    plan.weights = [TensorSpec(f"w{index}", "torch.float32", (1,), (1,)) for index in range(10)]
    with pytest.raises(PlanMismatchError, match=r"w0 is missing; .*w2 is missing and 7 more"):
        plan.check_weights({})
