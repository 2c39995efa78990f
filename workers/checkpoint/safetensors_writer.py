"""Writes a bfloat16 safetensors file, one piece of one tensor at a time, so that memory stays small.

``safetensors.numpy`` has no bfloat16, and it and ``safetensors.torch`` want all tensors in memory at once.
The format (https://huggingface.co/docs/safetensors) is a length, a JSON header and the raw values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 8
_BYTES_PER_VALUE = 2


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16 (ties to even, as torch does) and return its bits; same shape.

    A NaN stays a NaN (quiet); values beyond the largest bfloat16 become infinite.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if is_nan.any():
        rounded = np.where(is_nan, (bits >> 16) | 0x0040, rounded)
    return rounded.astype(np.uint16)


class SafetensorsWriter:
    """Writes tensors, in the order of ``shapes``, to a new file.

    Args:
        file: Opened for binary writing, at its start.
        shapes: Name to shape of everything that will be written.
    """

    def __init__(self, file: BinaryIO, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._file = file
        self._pending = list(shapes.items())
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            end = offset + math.prod(shape) * _BYTES_PER_VALUE
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, pieces: Iterable[npt.NDArray[np.float32]]) -> None:
        """Write one tensor from its values in row-major order, however they are cut into pieces."""
        expected, shape = self._pending.pop(0)
        assert name == expected, f"{name} written where {expected} was announced"
        num_written = 0
        for piece in pieces:
            num_written += piece.size
            self._file.write(bfloat16_bits(piece).data)
        assert num_written == math.prod(shape), f"{name}: {num_written} values for shape {shape}"

    def close(self) -> None:
        """Check that everything announced was written; the caller owns the file."""
        assert not self._pending, f"never written: {[name for name, _ in self._pending]}"
