# mypy: disable-error-code="import-not-found, import-untyped"
"""One specialisation of one Triton kernel, compiled ahead of time and launched with little host work.

Triton's ``kernel[grid](...)`` binds, classifies and hashes every argument on each call, and compiles when it meets a
new class of them. Here a kernel is compiled once, from example arguments, and launched directly: nothing can compile
while serving, and a launch costs the host a fraction of the time. The price is a promise by the caller: pointers and
strides of later calls are multiples of 16 where the example's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

#: Releases whose ``CompiledKernel.run`` is known to take what :meth:`KernelLaunch.__call__` passes. It spares the
#: profiler hooks of ``compiled[grid](...)``, half of a launch's host time; other releases go that documented way.
_DIRECT_RUN_RELEASES = ("3.6.",)


class KernelLaunch:
    """A kernel with its constants fixed.

    Args:
        kernel: A ``triton.jit`` function whose constexpr parameters come last.
        example: Runtime arguments to specialise for: torch dtypes for pointers, numbers for numbers.
        constants: Values of the constexpr parameters, in order.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline; less on a device that has not the shared memory for it.
        max_registers: Of a thread; 0 leaves it to the compiler.
        launch_pdl: Programmatic dependent launch; the kernel waits for the previous one by itself.
    """

    def __init__(
        self,
        kernel: Any,
        example: Sequence[Any],
        constants: Sequence[Any],
        *,
        num_warps: int = 4,
        num_stages: int = 1,
        max_registers: int = 0,
        launch_pdl: bool = False,
    ) -> None:
        assert len(kernel.arg_names) == len(example) + len(constants)
        self.kernel = kernel
        self.constants = tuple(constants)
        self._example = tuple(example)
        self._options: dict[str, Any] = {
            "num_warps": num_warps,
            "num_stages": num_stages,
            "maxnreg": max_registers or None,
            "launch_pdl": launch_pdl,
        }
        self._compiled: Any = None
        self._run: Any = None
        # TRITON_INTERPRET=1 turns jit functions into plain Python: nothing to compile.
        self._interpreted = is_interpreted(kernel)

    @property
    def hash(self) -> str:
        """Triton's hash of the compiled kernel, its folder in the Triton cache; empty before compilation."""
        return "" if self._compiled is None else str(self._compiled.hash)

    def start_compiling(self) -> None:
        """Compile, or take from Triton's disk cache; inside ``triton.AsyncCompileMode``, in the background."""
        if self._compiled is None and not self._interpreted:
            args = self._example + self.constants
            self._compiled = self.kernel.warmup(*args, grid=(1, 1, 1), **self._options)

    def load(self) -> None:
        """Finish compiling and load the binary into the current device's context; launches nothing."""
        if self._interpreted or self._run is not None:
            return
        driver: Any = triton.runtime.driver.active
        device = driver.get_current_device()
        compiled = self._load_what_fits()
        if not triton.__version__.startswith(_DIRECT_RUN_RELEASES):
            self._run = lambda grid, args: compiled[grid](*args)
            return
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

        def direct(grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
            stream = driver.get_current_stream(device)
            run(grid[0], grid[1], grid[2], stream, function, metadata, None, None, None, *args)

        self._run = direct

    def _load_what_fits(self) -> Any:
        while True:
            self.start_compiling()
            if isinstance(self._compiled, triton.FutureKernel):
                self._compiled = self._compiled.result()
            try:
                _ = self._compiled[(1, 1, 1)]  # loads the binary
                return self._compiled
            except OutOfResources as error:
                if error.name != "shared memory" or self._options["num_stages"] == 1:
                    raise
                self._options["num_stages"] -= 1
                self._compiled = None

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch on the current stream; ``args`` are the runtime arguments in order."""
        if self._interpreted:
            self.kernel[grid](*args, *self.constants)
            return
        if self._run is None:
            self.load()
        self._run(grid, args + self.constants)


def is_interpreted(kernel: Any) -> bool:
    """Whether Triton runs this function as plain Python, without what only a device has."""
    return not isinstance(kernel, JITFunction)


def can_overlap_launches(device: torch.device | int) -> bool:
    """Whether kernels can be launched while others drain: programmatic dependent launch, from Hopper on."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def num_sms(device: torch.device | int) -> int:
    """Multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def compile_all(launches: Sequence[KernelLaunch], num_threads: int = 8) -> None:
    """Compile side by side, then load."""
    with ThreadPoolExecutor(num_threads) as pool, triton.AsyncCompileMode(pool):
        for launch in launches:
            launch.start_compiling()
    for launch in launches:
        launch.load()
