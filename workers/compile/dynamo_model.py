"""Modes STOCK_TORCH_COMPILE and DYNAMO_TRACE_ONCE: the model as one Inductor program behind Dynamo.

Compiles at start, once, and refuses to compile ever again: a batch that would need it is an error, not a pause.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from workers.compile import torch_compat
from workers.compile.arguments import ArgumentCheck
from workers.compile.counters import CompileCounters
from workers.compile.errors import RecompileError
from workers.compile.plan import TensorSpec
from workers.compile.specialize import TYPICAL_SIZE
from workers.compile.trace import example_copies, fresh_forward, run_dynamo
from workers.graphs.context import ForwardContext, set_forward_context

logger = logging.getLogger(__name__)


class DynamoModel:
    """A model compiled by ``torch.compile``'s own machinery.

    Args:
        model: Its ``forward`` is traced for every size of the dynamic dimensions, in one graph.
        example_args: A tensor for each argument; values must be valid inputs, since the compiled model is run once.
        dims: The dynamic dimension of each argument.
        keeps_guards: Whether Dynamo goes on checking what it assumed (stock), or not (trace once). Without guards
            nothing but the sizes of ``dims`` may vary, which is checked here.
        options: Inductor options.
        counters: Counts traces, graph breaks and refused recompiles.

    Raises:
        GraphBreakError: The model does not trace into one graph.
    """

    def __init__(
        self,
        model: nn.Module,
        example_args: Mapping[str, torch.Tensor],
        dims: Mapping[str, int],
        *,
        keeps_guards: bool,
        options: Mapping[str, Any],
        counters: CompileCounters,
    ) -> None:
        self._options = dict(options)
        self._counters = counters
        self._is_started = False
        self._failed_guard = "none is reported"
        self._where = torch_compat.first_line(type(model).forward)
        started = time.perf_counter()
        self._compiled: Callable[..., Any] = torch_compat.dynamo_compile(
            fresh_forward(model), self._compile, keeps_guards=keeps_guards, on_guard_failure=self._note_guard
        )
        # Attention has neither metadata nor a cache yet: it writes zeros.
        with torch.inference_mode(), set_forward_context(ForwardContext(None, None, ())):
            # Without guards one token takes the code of many. With them it would not, unless nothing is assumed.
            size = None if keeps_guards else TYPICAL_SIZE
            run_dynamo(self._compiled, example_copies(example_args, dims, size=size), counters)
        self._is_started = True
        specs = [_spec(name, example_args[name], dim) for name, dim in dims.items()]
        self._check = None if keeps_guards else ArgumentCheck(specs, list(dims.values()), self._where, counters)
        logger.info("compiled in %.2f s", time.perf_counter() - started)

    def __call__(self, *args: torch.Tensor) -> Any:
        """Run the compiled model; under ``torch.inference_mode()``, as it was compiled.

        Raises:
            RecompileError: The batch would have to be compiled for.
            GraphBreakError: The same, and the model would not even trace for it.
        """
        if self._check is not None:
            self._check.size(args)
        try:
            return run_dynamo(self._compiled, args, self._counters)
        except Exception as error:
            refused = _find(error, RecompileError)
            if refused is None:
                raise
            raise refused from None

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Dynamo's backend."""
        if self._is_started:
            self._counters.num_recompiles_refused += 1
            message = f"{self._where} would compile again while serving; the guard that failed: {self._failed_guard}"
            logger.error("%s", message)
            raise RecompileError(message)
        from torch._inductor.compile_fx import compile_fx

        torch_compat.prepare_inductor()
        self._counters.num_traces += 1
        compiled = compile_fx(graph, inputs, config_patches=self._options)
        assert callable(compiled)
        self._counters.num_compiled += 1
        return compiled

    def _note_guard(self, reason: str) -> None:
        # The lines after the first are a stack of the model's code.
        self._failed_guard = reason.partition("\n")[0]


def _spec(name: str, example: torch.Tensor, dim: int) -> TensorSpec:
    shape = [*example.shape]
    return TensorSpec(name, str(example.dtype), (*shape[: dim % len(shape)], "n0", *shape[dim % len(shape) + 1 :]))


def _find(error: BaseException | None, kind: type[RecompileError]) -> RecompileError | None:
    """The first error of this kind in a chain: Dynamo wraps what its backend raises."""
    while error is not None:
        if isinstance(error, kind):
            return error
        inner = getattr(error, "inner_exception", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return None
