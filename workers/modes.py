"""The modes of the compile and graph layers, as enumerations that import nothing.

They live apart from the code that implements them so that the config and the command line can name them
without importing torch. Semantics: docs/architecture.md and the docstrings below (terms as in vLLM).
"""

from __future__ import annotations

import enum


class AttentionCGSupport(enum.IntEnum):
    """What an attention backend can do inside a captured graph; higher values include lower ones."""

    NEVER = 0
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    UNIFORM_BATCH = 2
    ALWAYS = 3


class CompilationMode(enum.IntEnum):
    """How much of torch.compile is applied to the model."""

    NONE = 0
    """Eager."""
    STOCK_TORCH_COMPILE = 1
    """Plain ``torch.compile``."""
    DYNAMO_TRACE_ONCE = 2
    """One Dynamo trace with its guards dropped; never a recompile."""
    VLLM_COMPILE = 3
    """Our backend: trace once, run fusion passes, split at attention, compile each unique piece."""
    PIECEWISE_COMPILE = 3
    """Another spelling of :attr:`VLLM_COMPILE`."""


class CUDAGraphMode(enum.Enum):
    """Which batches run as captured graphs, and how much of the forward pass one graph holds.

    A pair names the mode of pure decode batches and that of mixed batches (prefill and decode together). Only
    NONE, PIECEWISE and FULL can be the *runtime* mode of one batch.
    """

    NONE = 0
    """No graphs."""
    PIECEWISE = 1
    """One graph per region between attention ops; attention runs eagerly between them."""
    FULL = 2
    """One graph for the whole forward pass, attention included."""
    FULL_DECODE_ONLY = (FULL, NONE)
    """FULL for pure decode batches, no graph for mixed ones."""
    FULL_AND_PIECEWISE = (FULL, PIECEWISE)
    """FULL for pure decode batches, PIECEWISE for mixed ones; the default."""

    def separate_routine(self) -> bool:
        """Whether pure decode batches and mixed batches run in different modes."""
        return isinstance(self.value, tuple)

    def decode_mode(self) -> CUDAGraphMode:
        """Runtime mode of a pure decode batch."""
        return CUDAGraphMode(self.value[0]) if isinstance(self.value, tuple) else self

    def mixed_mode(self) -> CUDAGraphMode:
        """Runtime mode of a mixed batch."""
        return CUDAGraphMode(self.value[1]) if isinstance(self.value, tuple) else self

    def has_full(self) -> bool:
        """Whether some batches run as full graphs."""
        return CUDAGraphMode.FULL in (self.decode_mode(), self.mixed_mode())

    def has_piecewise(self) -> bool:
        """Whether some batches run as piecewise graphs."""
        return CUDAGraphMode.PIECEWISE in (self.decode_mode(), self.mixed_mode())

    def is_valid_runtime_mode(self) -> bool:
        """Whether one batch can run in this mode: NONE, PIECEWISE and FULL only."""
        return not self.separate_routine()

    @classmethod
    def valid_runtime_modes(cls) -> frozenset[CUDAGraphMode]:
        """The modes that one batch can run in."""
        return frozenset(mode for mode in cls if mode.is_valid_runtime_mode())
