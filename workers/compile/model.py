"""``compile_model``: a model and the compile config in, something to call with a batch out.

The one place that knows all modes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from workers.compile.counters import CompileCounters
from workers.compile.decorator import dynamic_arg_dims
from workers.compile.environment import environment_factors
from workers.compile.passes.standard import standard_passes
from workers.compile.piecewise import PiecewiseModel
from workers.compile.plan import Plan
from workers.compile.stitch import WrapPiece
from workers.compile.store import MemoryPieceStore, PieceStore
from workers.config import CompilationConfig
from workers.modes import CompilationMode

logger = logging.getLogger(__name__)

#: Ops that stay outside of pieces if the caller names none.
ATTENTION_OPS = ("warmgraph::attention",)


@dataclasses.dataclass(frozen=True, slots=True)
class CompileReport:
    """What compiling, or loading, came to.

    Attributes:
        is_warm: Whether everything came from the store.
        seconds: From the call of :func:`compile_model` to its return.
        piece_format: None where there are no pieces.
    """

    mode: CompilationMode
    is_warm: bool
    seconds: float
    piece_format: str | None
    num_pieces: int
    num_unique_pieces: int
    passes: Mapping[str, int]


class CompiledModel:
    """A model in the form that serves batches; call it with tensors in the order of ``forward``'s parameters.

    Attributes:
        mode: How it was compiled.
        report: What that came to.
        counters: Kept up to date while serving.
        plan: Of VLLM_COMPILE, else None.
    """

    def __init__(
        self, call: Callable[..., Any], report: CompileReport, counters: CompileCounters, plan: Plan | None = None
    ) -> None:
        self._call = call
        self.mode = report.mode
        self.report = report
        self.counters = counters
        self.plan = plan

    def __call__(self, *args: torch.Tensor) -> Any:
        """One forward pass."""
        return self._call(*args)


def compile_model(
    model: nn.Module,
    config: CompilationConfig,
    example_args: Mapping[str, torch.Tensor],
    *,
    enforce_eager: bool = False,
    splitting_ops: Sequence[str] = ATTENTION_OPS,
    wrap_piece: WrapPiece | None = None,
    store: PieceStore | None = None,
    factors: Mapping[str, Any] | None = None,
) -> CompiledModel:
    """Compile a model as the config says, or load what an earlier process compiled.

    Args:
        model: Of a class decorated with ``@support_torch_compile``, weights loaded.
        config: Mode, sizes, passes, options.
        example_args: A valid tensor for each dynamic argument of ``forward``, on the model's device.
        enforce_eager: Mode NONE, whatever the config says.
        splitting_ops: Ops that stay outside of pieces (VLLM_COMPILE).
        wrap_piece: Put around every piece call (VLLM_COMPILE), see :class:`workers.compile.stitch.PieceInfo`.
        store: Where plan and pieces are looked for and kept (VLLM_COMPILE); None keeps them in this process.
        factors: What the compiled code depends on besides what this layer knows: the model's configuration, say.

    Raises:
        CompileError: The class is not decorated, a config entry is wrong, or the model does not trace.
    """
    started = time.perf_counter()
    mode = CompilationMode.NONE if enforce_eager else config.resolved_mode(next(model.parameters()).device.type)
    counters = CompileCounters()

    def report(plan: Plan | None = None, is_warm: bool = False, piece_format: str | None = None) -> CompileReport:
        seconds = time.perf_counter() - started
        calls = plan.piece_calls() if plan is not None else []
        passes = plan.passes if plan is not None else {}
        return CompileReport(mode, is_warm, seconds, piece_format, len(calls), len(set(calls)), passes)

    if mode is CompilationMode.NONE:
        return CompiledModel(model, report(), counters)
    dims = dynamic_arg_dims(model)
    options = dict(config.inductor_compile_config)
    if mode is not CompilationMode.VLLM_COMPILE:
        from workers.compile.dynamo_model import DynamoModel

        keeps_guards = mode is CompilationMode.STOCK_TORCH_COMPILE
        call = DynamoModel(model, example_args, dims, keeps_guards=keeps_guards, options=options, counters=counters)
        return CompiledModel(call, report(), counters)

    store = store if store is not None else MemoryPieceStore()
    device = next(iter(example_args.values())).device
    piece_format = config.resolved_piece_format(device.type)
    passes = standard_passes(config.pass_config)
    all_factors = environment_factors(device) | {
        "model": dict(factors or {}),
        "dynamic_dims": dims,
        "splitting_ops": list(splitting_ops),
        "passes": passes.uuids(),
        "inductor": options,
    }
    sizes = [None, *sorted(set(config.compile_sizes))]
    name = plan_name(all_factors)
    plan = load_plan(store, name)
    is_warm = plan is not None and all(piece_format in plan.formats(size) for size in sizes)
    if not is_warm:
        from workers.compile.compiler import build_pieces, split_model
        from workers.compile.formats.base import make_format

        cold = split_model(model, example_args, dims, splitting_ops=splitting_ops, passes=passes, factors=all_factors)
        if plan is not None:
            for key, record in cold.plan.pieces.items():
                record.builds = plan.pieces[key].builds if key in plan.pieces else []
        counters.num_traces += 1
        counters.num_compiled += build_pieces(cold, make_format(piece_format, options), store, sizes)
        plan = cold.plan
        store.put(name, plan.to_json().encode())
    assert plan is not None
    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    piecewise = PiecewiseModel(
        plan, weights, store, piece_format, options=options, wrap_piece=wrap_piece, counters=counters
    )
    return CompiledModel(piecewise, report(plan, is_warm, piece_format), counters, plan)


def plan_name(factors: Mapping[str, Any]) -> str:
    """Name of the plan in the store."""
    return f"plan-{hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest()[:32]}.json"


def load_plan(store: PieceStore, name: str) -> Plan | None:
    """The plan, if the store has it."""
    data = store.get(name)
    return None if data is None else Plan.from_json(data)
