"""Reads the header of a GGUF file and hands out its tensors, a few rows at a time, as float32.

Knows the container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and nothing about models.
Block formats are the ``gguf`` package's business. Its own ``GGUFReader`` is not used because it makes several
numpy views per string: for a vocabulary of 49,152 tokens that takes 5 s and 160 MB.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from workers.errors import ModelError

#: A metadata value: int, float, bool, str, or a list of one of these.
Metadata = dict[str, Any]

_SUPPORTED_VERSIONS = (2, 3)
_MAX_DIMS = 4
_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file.

    Attributes:
        name: GGUF's name, for example ``blk.0.attn_q.weight``.
        shape: Row-major (slowest dimension first), as torch and numpy count.
        quant_type: How its values are stored.
        offset: First byte, from the start of the file.
        num_bytes: Stored size.
    """

    name: str
    shape: tuple[int, ...]
    quant_type: GGMLQuantizationType
    offset: int
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Product of all dimensions but the last; a vector is one row."""
        return math.prod(self.shape[:-1])


class GGUFFile:
    """A GGUF file opened for reading; use it as a context manager.

    Attributes:
        path: Where it is.
        metadata: Every key and value of the header.
        tensors: By GGUF name, in file order.

    Raises:
        ModelError: The file is not GGUF, is truncated, or holds a type that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            self.metadata, self.tensors = _read_header(self._file)
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
            self._file.close()
            raise ModelError(f"{path} cannot be read as a GGUF file: {error}.", param="model") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def rows(
        self, tensor: TensorInfo, order: npt.NDArray[np.intp] | None = None, max_values: int = 1 << 20
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Dequantise a tensor in pieces, so that memory is bounded by ``max_values`` and not by the tensor.

        Args:
            tensor: One of ``self.tensors``.
            order: For every output row the stored row it comes from, shape [num_rows]; None keeps the order.
                (The stored bytes of a reordered tensor are all held in memory, its values are not.)
            max_values: Most values per piece (at least one row is produced).

        Yields:
            float32 arrays [rows, shape[-1]] that together make up the tensor.

        Raises:
            ModelError: The ``gguf`` package cannot dequantise the tensor's type.
        """
        step = max(1, max_values // tensor.shape[-1])
        if order is None:
            for start in range(0, tensor.num_rows, step):
                yield self._dequantize(tensor, self._read_rows(tensor, start, min(start + step, tensor.num_rows)))
        else:
            stored = self._read_rows(tensor, 0, tensor.num_rows)
            for start in range(0, tensor.num_rows, step):
                yield self._dequantize(tensor, stored[order[start : start + step]])

    def values(self, tensor: TensorInfo) -> npt.NDArray[np.float32]:
        """A whole (small) tensor as float32 of its own shape."""
        return np.concatenate(list(self.rows(tensor))).reshape(tensor.shape)

    def _read_rows(self, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[np.uint8]:
        row_bytes = tensor.num_bytes // tensor.num_rows
        self._file.seek(tensor.offset + start * row_bytes)
        raw = self._file.read((stop - start) * row_bytes)
        return np.frombuffer(raw, np.uint8).reshape(stop - start, row_bytes)

    def _dequantize(self, tensor: TensorInfo, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        try:
            return dequantize(rows, tensor.quant_type)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: tensor {tensor.name} is stored as {tensor.quant_type.name}, which cannot be "
                "read; use another quantisation of this model, such as Q8_0.",
                param="model",
            ) from error


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self.data = data
        self.offset = offset

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.offset)
        self.offset += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        if self.offset + length > len(self.data):
            raise ValueError("a string runs past the end of the file")
        start, self.offset = self.offset, self.offset + length
        return str(self.data[start : self.offset], encoding="utf-8")

    def value(self, value_type: GGUFValueType) -> Any:
        if value_type == GGUFValueType.STRING:
            return self.string()
        if value_type != GGUFValueType.ARRAY:
            return self.unpack(_SCALAR_FORMATS[value_type])[0]
        element_type, count = self.unpack("IQ")
        element_type = GGUFValueType(element_type)
        if count > len(self.data) - self.offset:
            raise ValueError("an array runs past the end of the file")
        if element_type in _SCALAR_FORMATS:
            return list(self.unpack(f"{count}{_SCALAR_FORMATS[element_type]}"))
        return [self.value(element_type) for _ in range(count)]


def _read_header(file: BinaryIO) -> tuple[Metadata, dict[str, TensorInfo]]:
    if file.read(4) != b"GGUF":
        raise ValueError("it does not start with the letters GGUF")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse_header(data)


def _parse_header(data: mmap.mmap) -> tuple[Metadata, dict[str, TensorInfo]]:
    cursor = _Cursor(data, offset=len(b"GGUF"))
    (version,) = cursor.unpack("I")
    if version not in _SUPPORTED_VERSIONS:
        raise ValueError(f"version {version:#x} where {' or '.join(map(str, _SUPPORTED_VERSIONS))} was expected")
    num_tensors, num_keys = cursor.unpack("QQ")
    metadata: Metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        (value_type,) = cursor.unpack("I")
        metadata[key] = cursor.value(GGUFValueType(value_type))
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"an alignment of {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    tensors = {info.name: dataclasses.replace(info, offset=start + info.offset) for info in infos}
    if len(tensors) != len(infos):
        raise ValueError("two tensors have the same name")
    end = max((info.offset + info.num_bytes for info in tensors.values()), default=start)
    if end > len(data):
        raise ValueError(f"truncated: {len(data)} bytes of at least {end}")
    return metadata, tensors


def _read_tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    (num_dims,) = cursor.unpack("I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ValueError(f"tensor {name} has {num_dims} dimensions")
    shape = tuple(reversed(cursor.unpack(f"{num_dims}Q")))
    type_id, offset = cursor.unpack("IQ")
    quant_type = GGMLQuantizationType(type_id)
    block_size, block_bytes = GGML_QUANT_SIZES[quant_type]
    if not all(shape) or shape[-1] % block_size:
        raise ValueError(f"tensor {name} has shape {shape} in blocks of {block_size}")
    return TensorInfo(name, shape, quant_type, offset, math.prod(shape) // block_size * block_bytes)
