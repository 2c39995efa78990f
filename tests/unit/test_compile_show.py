"""A plan's summary counts what the plan holds, and its picture shows every step once."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from tests.unit.test_compile_plan import make_plan
from workers.compile.plan import Plan
from workers.compile.show import split_svg, summarize


def test_the_summary_counts_calls_ops_and_builds() -> None:
    summary = summarize(make_plan())
    assert (summary.num_piece_calls, summary.num_weights, summary.passes) == (2, 2, {"noop_elimination": 3})
    assert summary.split_ops == {"test::op": 1}
    first, last = summary.pieces
    assert (first.key, first.num_calls, first.num_ops) == ("first", 1, 1)
    assert [(build["format"], build["size"]) for build in first.builds] == [("fx", None), ("fx", 4)]
    assert [build["seconds"] for build in last.builds] == [0.1, 9.0]
    assert json.loads(json.dumps(summary.to_dict()))["pieces"][1]["ops"] == {"add": 2}


def texts_of(plan: Plan) -> list[str | None]:
    root = ElementTree.fromstring(split_svg(plan))
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_shows_every_step_and_what_was_built() -> None:
    assert texts_of(make_plan()) == [
        "piece first: 1 call, 1 ops",
        "1 linear",
        "fx, every size: 0.10 s, 2 bytes",
        "fx, size 4: 0.10 s, 2 bytes",
        "test::op",
        "piece last: 1 call, 2 ops",
        "2 add",
        "fx, every size: 0.10 s, 2 bytes",
        "aoti, every size: 9.00 s, 2 bytes",
    ]


def test_the_picture_folds_layers() -> None:
    plan = make_plan()
    first, op, last = plan.steps
    plan.steps = [first, op, *[last, op] * 30]
    texts = texts_of(plan)
    assert [text for text in texts if text and text.startswith(("piece", "test", "×"))] == [
        "piece first: 1 call, 1 ops",
        "test::op",
        "piece last: 30 calls, 2 ops",
        "× 30",
        "test::op",
    ]
