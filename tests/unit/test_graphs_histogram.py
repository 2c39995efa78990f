"""The batch-size histogram: counting, merging, fading, and bytes that are verified."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.graphs import BatchHistogram, HistogramError
from workers.graphs import histogram as module

BATCHES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=30)


def _histogram(batches: list[tuple[int, int]]) -> BatchHistogram:
    histogram = BatchHistogram()
    for num_reqs, extra in batches:
        histogram.record(num_reqs, num_reqs + extra, is_decode=extra == 0)
    return histogram


@given(BATCHES)
def test_bytes_round_trip(batches: list[tuple[int, int]]) -> None:
    histogram = _histogram(batches)
    data = histogram.to_json()
    again = BatchHistogram.from_json(data)
    assert again == histogram
    assert again.num_batches == histogram.num_batches == len(batches)
    assert again.to_json() == data
    assert _histogram(batches[::-1]).to_json() == data


@given(BATCHES, BATCHES)
def test_merge_is_recording_both(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    merged = _histogram(first)
    merged.merge(_histogram(second))
    assert merged == _histogram(first + second)
    assert merged.num_batches == len(first) + len(second)


def test_token_counts_put_both_kinds_together() -> None:
    histogram = BatchHistogram()
    histogram.record(2, 6, is_decode=True)
    histogram.record(1, 6, is_decode=False)
    assert histogram.decode == {2: 1}
    assert histogram.mixed == {6: 1}
    assert histogram.token_counts(query_len=3) == {6: 2}
    assert histogram.token_counts() == {2: 1, 6: 1}


def test_old_traffic_fades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BATCHES", 100)
    histogram = BatchHistogram()
    for _ in range(90):
        histogram.record(1, 1, is_decode=True)
    for _ in range(1000):
        histogram.record(8, 8, is_decode=True)
        assert histogram.num_batches <= 100
    assert set(histogram.decode) == {8}
    other = _histogram([(3, 5)] * 99)
    other.merge(histogram)
    assert other.num_batches <= 100
    assert other.mixed[8] == other.num_batches - other.decode[8]


def _document(**changes: object) -> bytes:
    document = json.loads(_histogram([(1, 0), (2, 4)]).to_json())
    document.update(changes)
    return json.dumps(document).encode()


@given(BATCHES, BATCHES, st.integers(1, 40))
def test_merging_either_way_gives_the_same_and_stays_bounded(
    first: list[tuple[int, int]], second: list[tuple[int, int]], limit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_BATCHES", limit)
        one, other = _histogram(first), _histogram(second)
        one.merge(_histogram(second))
        other.merge(_histogram(first))
        assert one == other
        assert one.num_batches == other.num_batches == one.decode.total() + one.mixed.total() <= limit


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes | str) -> None:
    with contextlib.suppress(HistogramError):
        BatchHistogram.from_json(data)


def _signed(decode: object) -> bytes:
    counts = {"decode": decode, "mixed": {}}
    return _document(**counts, sha256=module._checksum(counts))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"[]", "no format"),
        (_document(format="other"), "no format"),
        (_document(version=2), "has version 2"),
        (_document(decode={"1": 2}), "damaged"),
        (_document(sha256=None), "damaged"),
        (_signed({"1": -1}), "impossible count -1"),
        (_signed({"0": 1}), "impossible count 1 for size '0'"),
        (_signed({"x": 1}), "impossible count"),
        (_signed({"1": True}), "impossible count"),
        (_signed({"1": 1.5}), "impossible count"),
        (_signed([1]), "no counts"),
        (_signed({"01": 1}), "impossible count"),
        (_signed({"\u0663": 1}), "impossible count"),
        (_signed({"9" * 5000: 1}), "impossible count"),
        (_signed({str(module.MAX_SIZE + 1): 1}), "impossible count"),
        (_signed({"1": module.MAX_BATCHES + 1}), "impossible count"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"1" * 10_000, "not readable as JSON"),
        (b" " * (module.MAX_JSON_BYTES + 1), "longer than any"),
    ],
)
def test_wrong_bytes_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(HistogramError, match=match):
        BatchHistogram.from_json(data)


def test_every_flipped_digit_is_noticed() -> None:
    data = _histogram([(3, 0)] * 17).to_json().encode()
    start = data.index(b'"decode"')
    for index in range(start, start + 20):
        if chr(data[index]).isdigit():
            damaged = data[:index] + b"9" + data[index + 1 :]
            with pytest.raises(HistogramError):
                BatchHistogram.from_json(damaged)
