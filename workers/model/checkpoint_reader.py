"""Reads the tensors of a local safetensors checkpoint, whole or sharded, without copying files into memory.

Knows file names, the index and the headers; knows nothing about models. Tensors are views of the mapped
files: the pages are the file cache's, which the kernel can drop, and not this process's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from workers.errors import ModelError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Header entry of one tensor.

    Attributes:
        file: Name of the file that holds it.
        dtype: The safetensors name, for example ``BF16``.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Stored size; the dtype must be one that can be loaded."""
        num_values = 1
        for size in self.shape:
            num_values *= size
        return num_values * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype for torch.

        Raises:
            ModelError: Not fp32, bf16 or fp16.
        """
        if self.dtype not in _DTYPES:
            raise ModelError(
                f"{self.file}: tensor {self.name} is stored as {self.dtype}; only {', '.join(_DTYPES)} can be loaded.",
                param="model",
            )
        return _DTYPES[self.dtype]


class CheckpointReader:
    """Every tensor of a checkpoint folder; use it as a context manager.

    Attributes:
        tensors: Header entries by name, in the order of the files.

    Raises:
        ModelError: No safetensors, a missing or unreadable file, or one tensor in two files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        try:
            for name in find_weight_files(folder):
                self._open(name)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """A view of the mapped file, in the stored dtype; not to be written to."""
        view: torch.Tensor = self._files[tensor.file].get_tensor(tensor.name)
        return view

    def _open(self, file_name: str) -> None:
        path = self.folder / file_name
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise ModelError(f"{path} is missing; copy the checkpoint again.", param="model") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read ({error}); copy it again.", param="model") from error
        self._files[file_name] = file
        for name in file.offset_keys():
            if name in self.tensors:
                raise ModelError(
                    f"Tensor {name} is in {self.tensors[name].file} and in {file_name}; remove one of them.",
                    param="model",
                )
            header = file.get_slice(name)
            self.tensors[name] = StoredTensor(name, file_name, tuple(header.get_shape()), header.get_dtype())


def find_weight_files(folder: Path) -> list[str]:
    """Names of the files that together make up the checkpoint.

    Raises:
        ModelError: There are none, or the index cannot be understood.
    """
    if (folder / _SINGLE).exists():
        return [_SINGLE]
    index = folder / _INDEX
    if index.exists():
        return sorted(_files_in_index(index))
    others = next(_other_weights(folder), None)
    hint = f"convert {others} to safetensors" if others else "or set load_format: dummy for random weights"
    raise ModelError(f"{folder} has neither {_SINGLE} nor {_INDEX}; {hint}.", param="model")


def _files_in_index(index: Path) -> set[str]:
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not an index of safetensors files; copy it again.", param="model") from error
    for name in files:
        # An index may not lead out of its folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index} names {name!r}, which is not a file of the folder.", param="model")
    return files


def _other_weights(folder: Path) -> Iterator[str]:
    for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf", "*.safetensors"):
        yield from (path.name for path in folder.glob(pattern))
