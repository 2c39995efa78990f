"""Which layer a speed-up comes from: compile on and off, times graphs NONE, PIECEWISE and FULL, in one run.

All variants are loaded side by side and take turns, since a host's speed drifts more between runs than most
layers gain. Knows which flags make a variant; how steps are timed is the session's part.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from workers.analysis.costs import describe_device
from workers.analysis.session import DecodeSession, analysis_config
from workers.config import EngineConfig
from workers.graphs.report import GraphReport
from workers.runner.device import resolve_device


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One setting of the layers.

    Attributes:
        flags: What sets it, as keys below ``engine``.
        changes: The same as fields of the config.
    """

    name: str
    is_compiled: bool
    graphs: str
    flags: str
    changes: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class AblationCell:
    """One variant at one batch size.

    Attributes:
        step_ms: Median over the rounds.
        runs_as: Runtime mode of the graph layer, from its own counters.
    """

    variant: str
    batch: int
    step_ms: float
    runs_as: str


@dataclasses.dataclass(frozen=True, slots=True)
class Attribution:
    """Speed-ups at one batch size, each the ratio of two variants that differ in one layer; None if one is missing.

    Attributes:
        compile_alone: Compiled pieces against none, both without graphs.
        graphs_alone: FULL graphs against none, both without compiled pieces.
        pieces_in_graphs: PIECEWISE graphs against none, both compiled.
        full_over_pieces: FULL graphs against PIECEWISE ones, both compiled.
        graphs_on_compiled: FULL graphs against none, both compiled.
        both: Compiled with FULL graphs against neither.
    """

    batch: int
    compile_alone: float | None
    graphs_alone: float | None
    pieces_in_graphs: float | None
    full_over_pieces: float | None
    graphs_on_compiled: float | None
    both: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class AblationReport:
    """The table, and what it says.

    Attributes:
        notes: Why a variant is missing or is not what its name says.
    """

    variants: list[Variant]
    cells: list[AblationCell]
    attributions: list[Attribution]
    notes: list[str]
    device: str
    context: int

    def step_ms(self, variant: str, batch: int) -> float | None:
        """One figure of the table."""
        return _step_ms(self.cells, variant, batch)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        variants = [{"name": variant.name, "flags": variant.flags} for variant in self.variants]
        return dataclasses.asdict(self) | {"variants": variants}


def _variant(name: str, mode: str, graphs: str) -> Variant:
    flags = f"compilation_config: {{mode: {mode}, cudagraph_mode: {graphs}}}"
    changes = {"enforce_eager": False, "compilation_config": {"mode": mode, "cudagraph_mode": graphs}}
    return Variant(name, mode != "NONE", graphs, flags, changes)


#: ``enforce_eager`` is mode NONE without graphs on CUDA. On a CPU it also turns the recorded native program off.
EAGER = Variant("eager", False, "NONE", "enforce_eager: true", {"enforce_eager": True})
PLAIN = _variant("plain", "NONE", "NONE")
PLAIN_FULL = _variant("plain + FULL", "NONE", "FULL_DECODE_ONLY")
COMPILED = _variant("compiled", "VLLM_COMPILE", "NONE")
COMPILED_PIECEWISE = _variant("compiled + PIECEWISE", "VLLM_COMPILE", "PIECEWISE")
COMPILED_FULL = _variant("compiled + FULL", "VLLM_COMPILE", "FULL_AND_PIECEWISE")


def variants_for(device_type: str) -> list[Variant]:
    """What can be told apart on this kind of device. PIECEWISE without compiled pieces does not exist."""
    variants = [PLAIN, PLAIN_FULL, COMPILED, COMPILED_PIECEWISE, COMPILED_FULL]
    return variants if device_type == "cuda" else [EAGER, *variants]


def run_ablation(
    config: EngineConfig,
    batches: Sequence[int],
    context: int,
    *,
    steps_per_round: int = 20,
    rounds: int = 5,
    on_progress: Callable[[str], None] = lambda _: None,
) -> AblationReport:
    """Measure every variant of ``config`` at every batch size.

    Args:
        context: Prompt tokens of each request.
        rounds: Times that the variants take turns; the median is reported.
        on_progress: Told what happens next.

    Raises:
        ConfigError: The config does not allow these batches.
    """
    device = resolve_device(config.device)
    variants = variants_for(device.type)
    num_steps = steps_per_round * rounds
    cells: list[AblationCell] = []
    notes: list[str] = []
    with _piece_cache(config) as cached, ExitStack() as stack:
        sessions = {}
        for variant in variants:
            on_progress(f"loading: {variant.name}")
            changed = analysis_config(cached, batches, context, num_steps, **variant.changes)
            sessions[variant.name] = session = DecodeSession(changed, context)
            stack.callback(session.close)
            notes += _notes(variant, session.engine.runner.graph_report())
        for batch in batches:
            on_progress(f"measuring: batch {batch}")
            cells += _measure(sessions, batch, steps_per_round, rounds)
    attributions = [attribute(cells, batch) for batch in batches]
    return AblationReport(variants, cells, attributions, notes, describe_device(device), context)


def attribute(cells: Sequence[AblationCell], batch: int) -> Attribution:
    """The ratios of one batch size."""

    def ratio(slow: Variant, fast: Variant) -> float | None:
        before, after = _step_ms(cells, slow.name, batch), _step_ms(cells, fast.name, batch)
        return None if before is None or after is None else before / after

    return Attribution(
        batch=batch,
        compile_alone=ratio(PLAIN, COMPILED),
        graphs_alone=ratio(PLAIN, PLAIN_FULL),
        pieces_in_graphs=ratio(COMPILED, COMPILED_PIECEWISE),
        full_over_pieces=ratio(COMPILED_PIECEWISE, COMPILED_FULL),
        graphs_on_compiled=ratio(COMPILED, COMPILED_FULL),
        both=ratio(PLAIN, COMPILED_FULL),
    )


@contextmanager
def _piece_cache(config: EngineConfig) -> Iterator[EngineConfig]:
    """The config with a store for compiled pieces, so that the variants share what the first one compiles."""
    if config.artifacts.store is not None:
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="warmgraph-pieces-") as folder:
        yield config.model_copy(update={"artifacts": config.artifacts.model_copy(update={"store": folder})})


def _notes(variant: Variant, report: GraphReport) -> list[str]:
    if report.mode_reason is None or variant is EAGER:
        return []
    return [f"{variant.name}: {report.mode_reason}"]


def _measure(
    sessions: Mapping[str, DecodeSession], batch: int, steps_per_round: int, rounds: int
) -> Iterator[AblationCell]:
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    before = {name: session.mode_counts() for name, session in sessions.items()}
    with ExitStack() as stack:
        for session in sessions.values():
            stack.enter_context(session.holding(batch, steps_per_round * rounds))
        for _ in range(rounds):
            for name, session in sessions.items():
                samples[name].append(session.steps(steps_per_round) * 1e3)
        for name, session in sessions.items():
            runs = session.mode_counts() - before[name]
            yield AblationCell(name, batch, round(statistics.median(samples[name]), 4), runs.most_common(1)[0][0])


def _step_ms(cells: Sequence[AblationCell], variant: str, batch: int) -> float | None:
    return next((cell.step_ms for cell in cells if (cell.variant, cell.batch) == (variant, batch)), None)
