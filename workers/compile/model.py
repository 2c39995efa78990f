"""``compile_model``: a model and the compile config in, something to call with a batch out.

The one place that knows all modes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workers.compile import torch_compat
from workers.compile.counters import CompileCounters
from workers.compile.decorator import dynamic_arg_dims
from workers.compile.environment import environment_factors
from workers.compile.formats.base import make_format
from workers.compile.passes.manager import PassManager
from workers.compile.passes.standard import standard_passes
from workers.compile.piecewise import PiecewiseModel
from workers.compile.plan import Plan
from workers.compile.prefetch import wait_for_compiler
from workers.compile.stitch import WrapPiece
from workers.compile.store import MemoryPieceStore, PieceStore
from workers.compile.weights import tensor_spec, weight_names
from workers.config import CompilationConfig
from workers.modes import CompilationMode

if TYPE_CHECKING:
    from workers.compile.compiler import SplitModel

#: Ops that stay outside of pieces if the caller names none.
ATTENTION_OPS = ("warmgraph::attention",)

#: Inductor options unless the config says otherwise. What pieces take is settled by the plan and by the check of the
#: arguments; asserting it again in each piece would cost the host as much as launching its kernels.
DEFAULT_OPTIONS: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}


@dataclasses.dataclass(frozen=True, slots=True)
class CompileReport:
    """What compiling, or loading, came to.

    Attributes:
        seconds: From the call of :func:`compile_model` to its return.
        is_warm: Whether everything came from the store.
        piece_format: None where there are no pieces.
    """

    mode: CompilationMode
    seconds: float
    is_warm: bool = False
    piece_format: str | None = None
    num_pieces: int = 0
    num_unique_pieces: int = 0
    passes: Mapping[str, int] = dataclasses.field(default_factory=dict)


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
    device = next(iter(example_args.values())).device
    mode = CompilationMode.NONE if enforce_eager else config.resolved_mode(device.type)
    counters = CompileCounters()
    if mode is CompilationMode.NONE:
        return CompiledModel(model, CompileReport(mode, time.perf_counter() - started), counters)
    if mode is not CompilationMode.VLLM_COMPILE:
        wait_for_compiler()
        from workers.compile.dynamo_model import DynamoModel

        torch_compat.check_inductor_options(config.inductor_compile_config)
        dynamo = DynamoModel(
            model,
            example_args,
            dynamic_arg_dims(model),
            keeps_guards=mode is CompilationMode.STOCK_TORCH_COMPILE,
            options=DEFAULT_OPTIONS | config.inductor_compile_config,
            counters=counters,
        )
        return CompiledModel(dynamo, CompileReport(mode, time.perf_counter() - started), counters)
    pieces = PieceCompilation(model, config, example_args, splitting_ops, store or MemoryPieceStore(), factors or {})
    plan, piece_format, is_warm = pieces.load_or_build(counters)
    piecewise = PiecewiseModel(
        plan,
        weight_names(model),
        pieces.store,
        piece_format,
        sizes=config.compile_sizes,
        wrap_piece=wrap_piece,
        counters=counters,
    )
    calls = plan.piece_calls()
    report = CompileReport(
        mode, time.perf_counter() - started, is_warm, piece_format, len(calls), len(set(calls)), plan.passes
    )
    return CompiledModel(piecewise, report, counters, plan)


def _weights_digest(model: nn.Module) -> str:
    """A digest of the weights' names, shapes, dtypes and layouts."""
    specs = [dataclasses.astuple(tensor_spec(name, tensor)) for name, tensor in weight_names(model).items()]
    return hashlib.sha256(json.dumps(specs).encode()).hexdigest()


class PieceCompilation:
    """Everything that decides what a model's pieces are, and where they are kept.

    Args:
        model: See :func:`compile_model`, as for the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CompilationConfig,
        example_args: Mapping[str, torch.Tensor],
        splitting_ops: Sequence[str],
        store: PieceStore,
        factors: Mapping[str, Any],
    ) -> None:
        self.store = store
        self._model = model
        self._example_args = example_args
        self._splitting_ops = splitting_ops
        self._dims = dynamic_arg_dims(model)
        self._passes: PassManager = standard_passes(config.pass_config, splitting_ops)
        self._options = DEFAULT_OPTIONS | config.inductor_compile_config
        self._size_options = config.inductor_compile_config_for_sizes
        self._sizes: list[int | None] = [None, *sorted(set(config.compile_sizes))]
        device = next(iter(example_args.values())).device
        self._formats = config.piece_formats(device.type)
        self.factors: dict[str, Any] = environment_factors(device) | {
            "model": dict(factors),
            "dynamic_dims": self._dims,
            "splitting_ops": list(splitting_ops),
            "passes": self._passes.uuids(),
            "inductor": self._options,
            "inductor_for_sizes": self._size_options,
            "weights": _weights_digest(model),
        }

    @property
    def plan_name(self) -> str:
        """Name of the plan in the store: a digest of the factors."""
        text = json.dumps(self.factors, sort_keys=True)
        return f"plan-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def stored_plan(self) -> Plan | None:
        """The plan, if the store has it."""
        data = self.store.get(self.plan_name)
        return None if data is None else Plan.from_json(data)

    def load_or_build(self, counters: CompileCounters) -> tuple[Plan, str, bool]:
        """A plan with a complete set of pieces.

        Returns:
            The plan, the format to load, and whether it was all there.
        """
        plan = self.stored_plan()
        if plan is not None:
            for name in self._formats:
                if all(name in plan.formats(size) for size in self._sizes):
                    return plan, name, True
        return self.build(self._formats[-1], counters), self._formats[-1], False

    def split(self) -> SplitModel:
        """Trace and split; compiles nothing."""
        from workers.compile.compiler import split_model

        return split_model(
            self._model,
            self._example_args,
            self._dims,
            splitting_ops=self._splitting_ops,
            passes=self._passes,
            factors=self.factors,
        )

    def build(self, piece_format: str, counters: CompileCounters) -> Plan:
        """Trace, compile the pieces that the stored plan lacks in this format, and store the plan."""
        wait_for_compiler(only_if_begun=piece_format == "fx")
        from workers.compile.compiler import build_pieces

        if piece_format != "fx":
            torch_compat.check_inductor_options([*self._options, *(self._size_options or ())])
        split = self.split()
        counters.num_traces += 1
        # Read after the trace: another process may have added builds meanwhile.
        stored = self.stored_plan()
        if stored is not None:
            for key, record in split.plan.pieces.items():
                record.builds = stored.pieces[key].builds if key in stored.pieces else []
        builder = make_format(piece_format, self._options, self._size_options)
        counters.num_compiled += build_pieces(split, builder, self.store, self._sizes)
        self.store.put(self.plan_name, split.plan.to_json().encode())
        return split.plan
