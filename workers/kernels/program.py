"""Records a model's kernel calls once and replays them as one native call, for any number of tokens.

What a captured graph is on a GPU, on a CPU: between kernels there is no Python, no dispatcher and no allocation, and
all of them share one parallel region. Unlike a captured graph a program is not bound to a shape: every call either
does not depend on the number of tokens or grows with it in proportion, which is what makes recording it once enough.

Recording watches everything the model runs. Whatever is not a native kernel, a view or an allocation is an obstacle,
and there is then no program; so a program is complete, or absent. Only an eager model can be watched: compiled code
does not show. Knows nothing of layers: the order of calls is the model's own.
"""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import struct
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from workers.kernels import cpu_ops

#: Kernels that a program may hold, in the order of cpu_program.cpp, each with the argument that counts rows.
_KERNELS = {
    "wg_copy_rows": 3,
    "wg_unpack_rows": 3,
    "wg_linear": 6,
    "wg_rms_norm": 7,
    "wg_silu_and_mul": 2,
    "wg_rope": 10,
    "wg_attention": None,
}
_NUMBERS = {name: number for number, name in enumerate(_KERNELS)}
_MAX_OPERANDS = 14

# Kinds of operands and their bases, as in cpu_program.cpp.
_CONSTANT, _PER_TOKEN, _BASED, _THREADS = range(4)
_WORKSPACE, _OUTPUT, _STEP, _FIRST_INPUT = range(4)


class ObstacleError(Exception):
    """The function does something that no program can hold; the message says what."""


class _Operand(ctypes.Structure):
    _fields_ = (("value", ctypes.c_int64), ("kind", ctypes.c_int32), ("base", ctypes.c_int32))


class _Instruction(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_int64), ("operands", _Operand * _MAX_OPERANDS))


class NativeProgram:
    """A recorded function of token tensors (``[T]``, all of one length) to one tensor ``[T, ...]``.

    Attributes:
        max_tokens: Most tokens of a call.
    """

    def __init__(
        self,
        instructions: ctypes.Array[_Instruction],
        workspace: torch.Tensor,
        max_tokens: int,
        output_shape: tuple[int, ...],
        output_dtype: torch.dtype,
    ) -> None:
        self.max_tokens = max_tokens
        self._instructions = instructions
        self._workspace = workspace
        self._output_shape = output_shape
        self._output_dtype = output_dtype

    @classmethod
    def record(
        cls,
        function: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        step: cpu_ops.AttentionStep,
        max_tokens: int,
    ) -> tuple[torch.Tensor, Self]:
        """Call ``function(*inputs)`` and keep what it did; returns its result too.

        Args:
            function: Runs native kernels only. What it reads beside the inputs must outlive the program, in place.
            inputs: Contiguous, ``[T]`` with T at least 2: the strides of a single row say nothing about others.
            step: The attention step that the function's attention reads; every call brings its own.
            max_tokens: Most tokens of a call; the workspace is made for so many.

        Raises:
            ObstacleError: The function does something else as well.
        """
        assert inputs[0].shape[0] > 1
        assert len({x.data_ptr() for x in inputs}) == len(inputs), "inputs are told apart by their addresses"
        recording = _Recording(cpu_ops.library(), step)
        with recording, cpu_ops.stand_in(recording):
            output = function(*inputs)
        return output, cls._lay_out(recording, inputs, output, max_tokens)

    @classmethod
    def _lay_out(
        cls, recording: _Recording, inputs: Sequence[torch.Tensor], output: torch.Tensor, max_tokens: int
    ) -> Self:
        num_tokens = inputs[0].shape[0]
        layout = _Layout(recording.buffers, inputs, output, num_tokens, max_tokens)
        for index, call in enumerate(recording.calls):
            for argument, argtype in zip(call.arguments, cpu_ops.SIGNATURES[call.name], strict=True):
                if argtype is ctypes.c_void_p and isinstance(argument, int):
                    layout.note_use(argument, index)
        layout.place()
        instructions = (_Instruction * len(recording.calls))()
        for instruction, call in zip(instructions, recording.calls, strict=True):
            instruction.kernel = _NUMBERS[call.name]
            instruction.operands[: len(call.arguments)] = _operands(call, layout, num_tokens)
        workspace = torch.empty(layout.num_bytes, dtype=torch.uint8)
        return cls(instructions, workspace, max_tokens, tuple(output.shape[1:]), output.dtype)

    def __call__(self, inputs: Sequence[torch.Tensor], step: cpu_ops.AttentionStep) -> torch.Tensor:
        """Run on other inputs, contiguous and of one length up to ``max_tokens``."""
        num_tokens = inputs[0].shape[0]
        assert num_tokens <= self.max_tokens
        output = torch.empty((num_tokens, *self._output_shape), dtype=self._output_dtype)
        addresses = (self._workspace.data_ptr(), output.data_ptr(), ctypes.addressof(step))
        bases = (ctypes.c_void_p * (_FIRST_INPUT + len(inputs)))(*addresses, *(x.data_ptr() for x in inputs))
        cpu_ops.library().wg_run_program(
            self._instructions, len(self._instructions), bases, num_tokens, torch.get_num_threads()
        )
        return output


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: tuple[Any, ...]


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch carries no annotations here
    """Stands in for the kernels to note each call, and sees every other operation to refuse it."""

    _OURS: ClassVar[str] = "warmgraph"

    def __init__(self, kernels: Any, step: cpu_ops.AttentionStep) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        #: Everything allocated; held, so that each has addresses of its own.
        self.buffers: list[torch.Tensor] = []
        self._kernels = kernels
        self._step = ctypes.addressof(step)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise the first operation imports the compiler, which takes seconds."""
        return False

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in _KERNELS:
            raise AttributeError(name)

        def run_and_note(*arguments: Any) -> None:
            getattr(self._kernels, name)(*arguments)
            self.calls.append(_Call(name, arguments))

        return run_and_note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == self._OURS:
            with self:  # go on watching inside
                return func._op_dk(_kernel_key(func), *args, **kwargs)
        result = func(*args, **kwargs)
        if func.__name__.startswith(("empty.", "empty_like.", "new_empty.")):
            self.buffers.append(result)
        elif not (func.is_view and _is_alias(result, args)):
            raise ObstacleError(f"{func} is not a native kernel")
        return result


def _is_alias(result: Any, args: tuple[Any, ...]) -> bool:
    """Whether a view is one: ``contiguous``, ``reshape`` and ``to`` count as views even when they copy."""
    memory = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
    results = result if isinstance(result, (tuple, list)) else (result,)
    return all(x.untyped_storage().data_ptr() in memory for x in results)


def _kernel_key(func: Any) -> torch._C.DispatchKey:
    """Where the operator's own kernel is registered."""
    has_cpu = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")
    return torch._C.DispatchKey.CPU if has_cpu else torch._C.DispatchKey.CompositeExplicitAutograd


class _Layout:
    """Where each address of the recording will be in a later call.

    Buffers that are not alive at the same time share memory. Addresses outside of all buffers and inputs are
    constants: weights, caches, tables.
    """

    def __init__(
        self,
        buffers: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        output: torch.Tensor,
        num_tokens: int,
        max_tokens: int,
    ) -> None:
        self.num_bytes = 0
        self._num_tokens = num_tokens
        self._max_tokens = max_tokens
        bases = {x.data_ptr(): (x, _WORKSPACE) for x in buffers if x.nbytes}
        bases[output.data_ptr()] = output, _OUTPUT
        bases |= {x.data_ptr(): (x, _FIRST_INPUT + i) for i, x in enumerate(inputs)}
        self._starts = sorted(bases)
        self._tensors = [bases[start] for start in self._starts]
        self._uses: dict[int, list[int]] = {}
        self._offsets: dict[int, int] = {}

    def note_use(self, address: int, index: int) -> None:
        """Call number ``index`` reads or writes at this address."""
        number = self._find(address)
        if number is not None and self._tensors[number][1] == _WORKSPACE:
            self._uses.setdefault(number, []).append(index)

    def place(self) -> None:
        """Give every used buffer its part of the workspace, reusing parts of buffers that are done."""
        parts: list[tuple[int, int, int]] = []  # (last use, size, offset)
        for number, uses in sorted(self._uses.items(), key=lambda item: item[1][0]):
            size = self._size_for_max_tokens(self._tensors[number][0])
            reusable = next((part for part in parts if part[1] == size and part[0] < uses[0]), None)
            if reusable is None:
                offset, self.num_bytes = self.num_bytes, self.num_bytes + size
            else:
                parts.remove(reusable)
                offset = reusable[2]
            self._offsets[number] = offset
            parts.append((uses[-1], size, offset))

    def locate(self, address: int) -> tuple[int, int] | None:
        """(base, offset) of an address of the recording; None for a constant."""
        number = self._find(address)
        if number is None:
            return None
        base = self._tensors[number][1]
        return base, address - self._starts[number] + self._offsets.get(number, 0)

    def _find(self, address: int) -> int | None:
        """Number of the tensor that this address lies in."""
        number = bisect.bisect_right(self._starts, address) - 1
        if number < 0 or address >= self._starts[number] + self._tensors[number][0].nbytes:
            return None
        return number

    def _size_for_max_tokens(self, buffer: torch.Tensor) -> int:
        if buffer.nbytes % self._num_tokens:
            raise ObstacleError(f"a buffer of shape {tuple(buffer.shape)} is not a number of bytes per token")
        return -(-buffer.nbytes // self._num_tokens * self._max_tokens // 64) * 64


def _operands(call: _Call, layout: _Layout, num_tokens: int) -> tuple[_Operand, ...]:
    """The call's arguments as the interpreter wants them; the last integer of most kernels is the threads'."""
    argtypes = cpu_ops.SIGNATURES[call.name]
    rows_at = _KERNELS[call.name]
    operands = []
    for position, (argument, argtype) in enumerate(zip(call.arguments, argtypes, strict=True)):
        if argtype is ctypes.c_void_p:
            operands.append(_address(argument, layout))
        elif argtype is ctypes.c_float:
            operands.append(_Operand(int.from_bytes(struct.pack("=f", argument), "little"), _CONSTANT, 0))
        elif position == rows_at:
            assert argument % num_tokens == 0, f"{call.name}: {argument} rows of {num_tokens} tokens"
            operands.append(_Operand(argument // num_tokens, _PER_TOKEN, 0))
        elif rows_at is not None and position == len(argtypes) - 1:
            operands.append(_Operand(0, _THREADS, 0))
        else:
            operands.append(_Operand(int(argument), _CONSTANT, 0))
    return tuple(operands)


def _address(argument: Any, layout: _Layout) -> _Operand:
    if argument is None:
        return _Operand(0, _CONSTANT, 0)
    if not isinstance(argument, int):  # a reference to the step
        return _Operand(0, _BASED, _STEP)
    located = layout.locate(argument)
    if located is None:
        return _Operand(argument, _CONSTANT, 0)
    base, offset = located
    return _Operand(offset, _BASED, base)
