"""A plan's summary counts what the plan holds, and its picture has a row for every step."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from tests.unit.test_compile_plan import make_plan
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


def test_the_picture_has_a_row_for_every_step() -> None:
    root = ElementTree.fromstring(split_svg(make_plan()))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["0: piece first  1 ops: 1 linear", "test::op(3)", "1: piece last  2 ops: 2 add"]
