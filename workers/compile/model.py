"""``compile_model``: a model and the compile config in, something to call with a batch out.

The one place that knows all modes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from workers.artifacts.errors import Refusal, RefusedError, StoreError
from workers.artifacts.key import BundleKey
from workers.artifacts.library import ArtifactLibrary, Outcome
from workers.compile import torch_compat
from workers.compile.check_process import is_wanted
from workers.compile.compilation import BuildFlight, PieceCompilation, build_alone
from workers.compile.counters import CompileCounters
from workers.compile.decorator import dynamic_arg_dims
from workers.compile.errors import BuildFailedError, CompileError, PlanMismatchError, SelfCheckError
from workers.compile.key import ATTENTION_OPS, bundle_key, inductor_options
from workers.compile.piece_set import PieceSet
from workers.compile.piecewise import PiecewiseModel
from workers.compile.plan import Plan
from workers.compile.prefetch import wait_for_compiler
from workers.compile.probes import read_probes, try_piece
from workers.compile.self_check import check_on_node, note_built_here
from workers.compile.stitch import KeepRows, WrapPiece
from workers.compile.transient import is_transient
from workers.compile.weights import weight_names
from workers.config import CompilationConfig
from workers.modes import CompilationMode
from workers.startup.account import StartupAccount

logger = logging.getLogger(__name__)

#: Options of Inductor that have it compare launch shapes on the device.
_TUNING_OPTIONS = frozenset({"coordinate_descent_tuning", "max_autotune", "max_autotune_pointwise"})


@dataclasses.dataclass(frozen=True, slots=True)
class CompileReport:
    """What compiling, or loading, came to.

    Attributes:
        seconds: From the call of :func:`compile_model` to its return.
        is_warm: Whether everything came from the library.
        piece_format: None where there are no pieces.
        passes: Matches of each fusion pass.
        outcome: What came of looking for a bundle.
        miss: On a miss, the factors that differ from the nearest bundle, in a few words.
        find_seconds: Spent on manifests.
        fetch_seconds: Spent on reading and verifying blobs.
        check_seconds: Spent on trying the pieces in a process of their own.
        load_seconds: Spent on loading pieces and binding weights.
        num_bytes: Of the pieces.
        saved_seconds: What these pieces took whoever built them; 0 if that was this process.
    """

    mode: CompilationMode
    seconds: float
    is_warm: bool = False
    piece_format: str | None = None
    num_pieces: int = 0
    num_unique_pieces: int = 0
    passes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    outcome: Outcome | None = None
    miss: str = ""
    find_seconds: float = 0.0
    fetch_seconds: float = 0.0
    check_seconds: float = 0.0
    load_seconds: float = 0.0
    num_bytes: int = 0
    saved_seconds: float = 0.0


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
    keep_rows: KeepRows | None = None,
    library: ArtifactLibrary | None = None,
    key: BundleKey | None = None,
    flight: BuildFlight = build_alone,
    account: StartupAccount | None = None,
    counters: CompileCounters | None = None,
) -> CompiledModel:
    """Compile a model as the config says, or load what an earlier process compiled.

    Args:
        model: Of a class decorated with ``@support_torch_compile``, weights loaded.
        config: Mode, sizes, passes, options.
        example_args: A valid tensor for each dynamic argument of ``forward``, on the model's device.
        enforce_eager: Mode NONE, whatever the config says.
        splitting_ops: Ops that stay outside of pieces (VLLM_COMPILE).
        wrap_piece: Put around every piece call (VLLM_COMPILE), see :class:`workers.compile.stitch.PieceInfo`.
        keep_rows: Chooses the rows that go on after the last split op (VLLM_COMPILE), see
            :func:`workers.compile.stitch.stitch`.
        library: Where pieces are looked for and published (VLLM_COMPILE); None keeps them in this process.
        key: What compiled code depends on (VLLM_COMPILE); None takes what this layer knows, which says nothing of the
            model and so suffices in memory only.
        flight: Decides who of several processes builds.
        account: Where a start is written down (VLLM_COMPILE).
        counters: Of the engine; None makes some for this model alone.

    Raises:
        CompileError: The class is not decorated, a config entry is wrong, or the model does not trace.
        BuildFailedError: The compiler failed, now or recently, or what it built is wrong.
    """
    started = time.perf_counter()
    device = next(iter(example_args.values())).device
    mode = CompilationMode.NONE if enforce_eager else config.resolved_mode(device.type)
    counters = counters if counters is not None else CompileCounters()
    if not enforce_eager and (unread := config.without_effect(mode)):
        logger.warning("compilation mode %s takes no notice of %s", mode.name, ", ".join(unread))
    if mode is CompilationMode.VLLM_COMPILE:
        warn_of_tuning(config, device)
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
            options=inductor_options(config),
            counters=counters,
        )
        return CompiledModel(dynamo, CompileReport(mode, time.perf_counter() - started), counters)
    if key is None:
        key = bundle_key(config, device, dynamic_arg_dims(model), splitting_ops=splitting_ops)
    account = account or StartupAccount()
    compilation = PieceCompilation(
        model, config, example_args, splitting_ops, library or ArtifactLibrary.in_memory(), key, counters, account
    )
    where = torch_compat.first_line(type(model).forward)
    loading = _Loading(compilation, flight, str(device), wrap_piece, keep_rows, where, counters, account)
    piecewise, pieces = loading.load(weight_names(model))
    return CompiledModel(piecewise, loading.report(pieces, mode, started), counters, pieces.plan)


def warn_of_tuning(config: CompilationConfig, device: torch.device) -> None:
    """A format that forgets what was tuned has every process tune again, in its first steps."""
    options = config.inductor_compile_config | (config.inductor_compile_config_for_sizes or {})
    tuning = [name for name in sorted(_TUNING_OPTIONS) if options.get(name)]
    if tuning and device.type == "cuda" and config.piece_formats(device.type)[-1] == "standalone":
        logger.warning(
            "standalone pieces do not keep what %s finds, and every process tunes again at its first call;"
            " aoti pieces do (`warmgraph warm` builds them)",
            ", ".join(tuning),
        )


class _Loading:
    """Gets the pieces of one model and loads them, and puts aside what must not be loaded.

    Args:
        compilation: Where they come from.
        flight: Who builds.
        device: Where they run.
        where: ``file:line (name)`` of the model's code.
    """

    def __init__(
        self,
        compilation: PieceCompilation,
        flight: BuildFlight,
        device: str,
        wrap_piece: WrapPiece | None,
        keep_rows: KeepRows | None,
        where: str,
        counters: CompileCounters,
        account: StartupAccount,
    ) -> None:
        self._account = account
        self._compilation = compilation
        self._flight = flight
        self._device = device
        self._wrap_piece = wrap_piece
        self._keep_rows = keep_rows
        self._where = where
        self._counters = counters
        self._check_seconds = self._load_seconds = 0.0

    def load(self, weights: Mapping[str, torch.Tensor]) -> tuple[PiecewiseModel, PieceSet]:
        """A model that runs. What is found and turns out bad is quarantined and built once more.

        Raises:
            BuildFailedError: That was no better, or the compiler failed.
        """
        compilation = self._compilation
        for is_last in (False, True):
            pieces = self._flight(compilation.key.digest, compilation.find, compilation.build, compilation.publish)
            try:
                return self._load(pieces, weights), pieces
            except StoreError as error:
                # Somebody else's bundle that cannot be read now is as good as none.
                logger.warning("the pieces of key %s cannot be fetched: %s", compilation.key.digest[:16], error)
                return self._build_here(weights)
            except (RefusedError, PlanMismatchError, SelfCheckError) as error:
                if is_last or not pieces.is_warm:
                    raise BuildFailedError(str(error)) from error
                if not isinstance(error, RefusedError):
                    self._quarantine(pieces, error)
        raise AssertionError

    def report(self, pieces: PieceSet, mode: CompilationMode, started: float) -> CompileReport:
        """What it came to."""
        sizes = self._compilation.sizes
        calls, lookup = pieces.plan.piece_calls(), self._compilation.lookup
        explanation = lookup.explanation if lookup else None
        saved = pieces.build_seconds(sizes) if pieces.is_warm else 0.0
        self._compilation.library.counters.seconds_saved += saved
        return CompileReport(
            mode,
            time.perf_counter() - started,
            pieces.is_warm,
            pieces.piece_format,
            len(calls),
            len(set(calls)),
            pieces.plan.passes,
            lookup.outcome if lookup else None,
            explanation.label if explanation else "",
            lookup.seconds if lookup else 0.0,
            pieces.fetch_seconds,
            self._check_seconds,
            self._load_seconds,
            sum(build.num_bytes for build in pieces.builds(sizes)),
            saved,
        )

    def _build_here(self, weights: Mapping[str, torch.Tensor]) -> tuple[PiecewiseModel, PieceSet]:
        pieces = self._compilation.build()
        return self._load(pieces, weights), pieces

    def _load(self, pieces: PieceSet, weights: Mapping[str, torch.Tensor]) -> PiecewiseModel:
        """Everything is fetched and verified, then tried in a child process, and only then loaded here."""
        sizes = self._compilation.sizes
        with self._account.phase("fetch, verify"):
            pieces.fetch(sizes)
        if pieces.is_warm:
            self._check(pieces)
        started = time.perf_counter()
        try:
            with self._account.phase("load"):
                model = PiecewiseModel(
                    pieces,
                    weights,
                    sizes=[size for size in sizes if size is not None],
                    wrap_piece=self._wrap_piece,
                    keep_rows=self._keep_rows,
                    where=self._where,
                    counters=self._counters,
                )
            if not pieces.is_warm and is_wanted(self._compilation.library.config) and self._run_here(pieces, model):
                note_built_here(pieces, sizes)
            return model
        except CompileError:
            raise
        except Exception as error:
            # A loader can fail in any way; what is not for want of memory or disk is the bytes' fault.
            if is_transient(error):
                message = f"Loading failed for want of something on this machine: {type(error).__name__}: {error}"
                raise BuildFailedError(message) from error
            raise SelfCheckError(f"Loading failed: {type(error).__name__}: {error}") from error
        finally:
            self._load_seconds += time.perf_counter() - started

    def _check(self, pieces: PieceSet) -> None:
        config = self._compilation.library.config
        if not is_wanted(config):
            return
        started = time.perf_counter()
        with self._account.phase("self-check"):
            check_on_node(pieces, self._compilation.sizes, self._device, config.self_check_timeout_s)
        self._check_seconds += time.perf_counter() - started

    def _run_here(self, pieces: PieceSet, model: PiecewiseModel) -> bool:
        """Whether what was built here gives here what it should; if it ends the process, nobody will have said so."""
        device = torch.device(self._device)
        try:
            probes = {size: read_probes(data) for size, data in pieces.probes.items()}
            for (key, size), piece in model.loaded.items():
                problem = try_piece(piece, probes[size][key], device) if size in probes else None
                if problem is not None:
                    logger.warning("piece %s, just built: %s", key[:8], problem)
                    return False
            return True
        except Exception as error:
            logger.exception("a piece that was just built does not run alone: %s", error)
            return False

    def _quarantine(self, pieces: PieceSet, error: Exception) -> None:
        assert pieces.bundle is not None
        if isinstance(error, SelfCheckError):
            # Code that was wrong is wrong in every bundle.
            blobs = error.blobs or [build.sha256 for build in pieces.builds(self._compilation.sizes)]
            self._compilation.library.quarantine(pieces.bundle, Refusal.SELF_CHECK, str(error), blobs)
        else:
            # A plan for other weights says nothing of its pieces.
            self._compilation.library.quarantine(pieces.bundle, Refusal.STRUCTURE, str(error))
