"""The GGUF reader against the gguf package's own reader and writer, and against broken files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model_fixtures import tiny_metadata, tiny_tensors, write_gguf, write_tiny_gguf
from workers.checkpoint.gguf_file import GGUFFile
from workers.errors import ModelError

_SCALARS = st.one_of(
    st.booleans(), st.integers(0, 2**32 - 1), st.floats(width=32, allow_nan=False), st.text(min_size=1, max_size=20)
)
_LISTS = st.one_of(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.text(max_size=8), min_size=1, max_size=5),
)
_KEYS = st.text("abcdef._", min_size=1, max_size=12).map(lambda key: f"test.{key}")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@settings(max_examples=50, deadline=None)
@given(values=st.dictionaries(_KEYS, st.one_of(_SCALARS, _LISTS), max_size=8))
def test_metadata_round_trip(scratch: Path, values: dict[str, object]) -> None:
    path = write_gguf(scratch / "metadata.gguf", {"general.architecture": "llama", **values}, {})
    with GGUFFile(path) as file:
        assert {key: value for key, value in file.metadata.items() if key.startswith("test.")} == values
        assert file.tensors == {}


@pytest.mark.parametrize(
    "quant_type",
    [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0")],
)
def test_tensors_equal_the_gguf_package(tmp_path: Path, quant_type: GGMLQuantizationType) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        "matrix": (rng.normal(size=(37, 256)), quant_type),
        "vector": (rng.normal(size=96), GGMLQuantizationType.F32),
    }
    path = write_gguf(tmp_path / "t.gguf", {}, tensors)
    reference = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    order = rng.permutation(37)
    with GGUFFile(path) as file:
        assert list(file.tensors) == list(tensors)
        for name, tensor in file.tensors.items():
            expected = dequantize(reference[name].data, quant_type if name == "matrix" else GGMLQuantizationType.F32)
            assert tensor.shape == tensors[name][0].shape
            np.testing.assert_array_equal(file.values(tensor), expected)
            # However small the pieces, the values are the same.
            pieces = list(file.rows(tensor, max_values=300))
            np.testing.assert_array_equal(np.concatenate(pieces).reshape(tensor.shape), expected)
            assert max(piece.size for piece in pieces) <= 300
        matrix = file.tensors["matrix"]
        shuffled = np.concatenate(list(file.rows(matrix, order, max_values=1000)))
        np.testing.assert_array_equal(shuffled, file.values(matrix)[order])


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S"])
def test_super_blocks_equal_the_gguf_package(tmp_path: Path, name: str) -> None:
    quant_type = GGMLQuantizationType[name]
    block_size, block_bytes = GGML_QUANT_SIZES[quant_type]
    stored = np.random.default_rng(2).integers(0, 128, (9, 512 // block_size * block_bytes), dtype=np.uint8)
    path = write_gguf(tmp_path / "t.gguf", {}, {"matrix": (stored, quant_type)})
    with GGUFFile(path) as file, np.errstate(all="ignore"):
        assert file.tensors["matrix"].shape == (9, 512)
        np.testing.assert_array_equal(file.values(file.tensors["matrix"]), dequantize(stored, quant_type))


def test_custom_alignment(tmp_path: Path) -> None:
    tensors = {"a": (np.arange(3.0), GGMLQuantizationType.F32), "b": (np.arange(5.0), GGMLQuantizationType.F32)}
    path = write_gguf(tmp_path / "t.gguf", {"general.alignment": 256}, tensors)
    with GGUFFile(path) as file:
        assert [tensor.offset % 256 for tensor in file.tensors.values()] == [0, 0]
        np.testing.assert_array_equal(file.values(file.tensors["b"]), np.arange(5.0))


def test_type_that_cannot_be_dequantised_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", {}, {"odd": (np.zeros((2, 32)), GGMLQuantizationType.F32)})
    data = bytearray(path.read_bytes())
    start = data.index(b"odd") + 3 + 4 + 16  # name, number of dimensions, dimensions
    data[start : start + 4] = int(GGMLQuantizationType.I32).to_bytes(4, "little")
    path.write_bytes(data)
    with GGUFFile(path) as file, pytest.raises(ModelError, match=r"odd is stored as I32.*Q8_0"):
        file.values(file.tensors["odd"])


@pytest.fixture(scope="module")
def tiny_bytes(scratch: Path) -> bytes:
    return write_tiny_gguf(scratch / "tiny.gguf").read_bytes()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_a_model_error(scratch: Path, tiny_bytes: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(tiny_bytes) - 1), label="length")
    path = scratch / "truncated.gguf"
    path.write_bytes(tiny_bytes[:length])
    with pytest.raises(ModelError, match=r"truncated\.gguf cannot be read"):
        GGUFFile(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_header_never_crashes(scratch: Path, tiny_bytes: bytes, data: st.DataObject) -> None:
    damaged = bytearray(tiny_bytes)
    for _ in range(data.draw(st.integers(1, 3), label="count")):
        damaged[data.draw(st.integers(0, 8000), label="offset")] = data.draw(st.integers(0, 255), label="value")
    path = scratch / "damaged.gguf"
    path.write_bytes(damaged)
    with contextlib.suppress(ModelError), GGUFFile(path) as file:
        assert all(tensor.offset + tensor.num_bytes <= len(damaged) for tensor in file.tensors.values())


def test_files_are_closed_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "not.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        with pytest.raises(ModelError, match="does not start with"):
            GGUFFile(path)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_duplicate_tensor_names_are_refused(tmp_path: Path) -> None:
    tensors = {name: (np.zeros(2), GGMLQuantizationType.F32) for name in ("twin_a", "twin_b")}
    path = write_gguf(tmp_path / "t.gguf", {}, tensors)
    path.write_bytes(path.read_bytes().replace(b"twin_b", b"twin_a"))
    with pytest.raises(ModelError, match="same name"):
        GGUFFile(path)


def test_a_whole_model_header(tmp_path: Path) -> None:
    metadata, tensors = tiny_metadata("qwen3"), tiny_tensors("qwen3")
    with GGUFFile(write_gguf(tmp_path / "m.gguf", metadata, tensors)) as file:
        assert file.metadata["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]
        assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
            name: data.shape for name, (data, _) in tensors.items()
        }
