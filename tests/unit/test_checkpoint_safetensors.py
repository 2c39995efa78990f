"""Rounding to bfloat16 and the safetensors container."""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import deserialize

from workers.checkpoint.safetensors_writer import SafetensorsWriter, bfloat16_bits


def _as_float(bits: int) -> float:
    return float(np.array([bits << 16], np.uint32).view(np.float32)[0])


@given(st.floats(width=32, allow_nan=False))
def test_rounds_to_the_nearest_even(value: float) -> None:
    bits = int(bfloat16_bits(np.array([value], np.float32))[0])
    lower = int(np.array([value], np.float32).view(np.uint32)[0]) >> 16  # towards zero
    upper = lower + 1
    if math.isinf(value) or _as_float(lower) == value:
        assert bits == lower
        return
    # The neighbour beyond the largest finite bfloat16 counts as 2^128, as IEEE 754 rounds.
    above = math.copysign(2.0**128, value) if math.isinf(_as_float(upper)) else _as_float(upper)
    down, up = abs(value - _as_float(lower)), abs(above - value)
    assert bits == (lower if down < up else upper if up < down else lower + lower % 2)


@given(hnp.arrays(np.uint32, 4, elements=st.integers(0x7F800001, 0x7FFFFFFF)), st.booleans())
def test_nan_stays_nan(bits: npt.NDArray[np.uint32], negative: bool) -> None:
    values = (bits | (np.uint32(0x80000000) if negative else np.uint32(0))).view(np.float32)
    assert all(math.isnan(_as_float(int(rounded))) for rounded in bfloat16_bits(values))


def test_file_is_what_safetensors_reads() -> None:
    first = np.arange(12, dtype=np.float32).reshape(3, 4)
    second = np.array([0.5, -1.0], np.float32)
    buffer = io.BytesIO()
    writer = SafetensorsWriter(buffer, {"first": (3, 4), "second": (2,)})
    writer.write("first", (first[:1], first[1:]))
    writer.write("second", (second,))
    writer.close()
    tensors = dict(deserialize(buffer.getvalue()))  # type: ignore[no-untyped-call]  # has no annotations
    assert {name: (info["dtype"], info["shape"]) for name, info in tensors.items()} == {
        "first": ("BF16", [3, 4]),
        "second": ("BF16", [2]),
    }
    assert bytes(tensors["first"]["data"]) == bfloat16_bits(first).tobytes()
    assert bytes(tensors["second"]["data"]) == bfloat16_bits(second).tobytes()
    header_bytes = int.from_bytes(buffer.getvalue()[:8], "little")
    assert header_bytes % 8 == 0, "tensors start aligned, so that they can be mapped"


def test_what_was_announced_must_be_written() -> None:
    writer = SafetensorsWriter(io.BytesIO(), {"a": (2,), "b": (2,)})
    with pytest.raises(AssertionError, match="1 values for shape"):
        writer.write("a", (np.zeros(1, np.float32),))
    with pytest.raises(AssertionError, match="never written"):
        writer.close()
    with pytest.raises(AssertionError, match="announced"):
        writer.write("c", ())
