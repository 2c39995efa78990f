"""Builds and publishes everything that engines of a configuration will look for, ahead of a roll-out.

Starts one engine with made-up weights: that builds the format that is ready first, measures memory and captures every
graph. Then builds the other formats. What is in the store already is left alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from workers.compile.compilation import PieceCompilation
from workers.compile.stored import StoredPieces
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.errors import ConfigError
from workers.leases.base import LeaseService
from workers.runner.artifacts import compiles_pieces
from workers.runner.flight import PieceFlight, leases_of
from workers.runner.model_runner import ModelRunner
from workers.startup.account import StartupAccount


@dataclasses.dataclass(frozen=True, slots=True)
class WarmedFormat:
    """The pieces of one format.

    Attributes:
        name: Of the format.
        was_there: Nothing had to be built.
        seconds: What that took here.
        num_pieces: Builds, sizes counted.
        num_bytes: Of the builds.
    """

    name: str
    was_there: bool
    seconds: float
    num_pieces: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class WarmReport:
    """What :func:`warm` came to.

    Attributes:
        key: Of the bundle.
        formats: In the order in which they were built.
        num_graphs: Graphs that an engine captured, which shows that they fit.
        seconds: In all.
    """

    key: str
    formats: list[WarmedFormat]
    num_graphs: int
    seconds: float


def warm(
    config: EngineConfig,
    leases: LeaseService | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> WarmReport:
    """Build what is missing, and publish it.

    Args:
        leases: Keeps replicas that start meanwhile from building the same; None is beside the store.
        on_progress: Told what is done next.

    Raises:
        ConfigError: Nothing would be published, or nothing is compiled.
        BuildFailedError: The compiler failed.
    """
    started = time.perf_counter()
    if config.artifacts.store is None or not config.artifacts.publish:
        raise ConfigError("Nothing would be published: set artifacts.store and artifacts.publish.", param="artifacts")
    compilation = config.compilation_config
    if not compiles_pieces(config):
        raise ConfigError("Nothing is compiled ahead: set compilation_config.mode to VLLM_COMPILE.", param="mode")
    account = StartupAccount(f"warm {config.model}")
    leases = leases or leases_of(config.artifacts)
    on_progress("starting an engine with made-up weights")
    dummy = {"load_format": "dummy", "skip_tokenizer_init": True}
    engine = Engine(config.model_copy(update=dummy), account, leases=leases)
    runner, built_s = engine.runner, account.report().seconds("build")
    if not runner.library.trust.may_publish:
        raise ConfigError("Nothing would be published: trust 'signed' needs artifacts.signer_key_file.", param="trust")
    on_progress("capturing every graph")
    while engine.use_idle_time():
        pass
    runner.wait_shared()
    names = compilation.piece_formats(runner.device.type)
    formats = []
    for name in reversed(names):
        on_progress(f"building {name} pieces")
        row = _warm_format(name, config, runner, leases, account)
        if name == names[-1] and not runner.artifact_warm:
            # The engine's own start has built these.
            row = dataclasses.replace(row, was_there=False, seconds=built_s)
        formats.append(row)
    engine.save_traffic()
    graphs = sum(engine.graph_report().captured.values())
    return WarmReport(runner.bundle_key.digest, formats, graphs, round(time.perf_counter() - started, 3))


def _warm_format(
    name: str, config: EngineConfig, runner: ModelRunner, leases: LeaseService, account: StartupAccount
) -> WarmedFormat:
    """Find or build the pieces of one format, under the lease that a replica would take."""
    started = time.perf_counter()
    compilation, sizes = config.compilation_config, config.compilation_config.all_sizes()
    ids_T = torch.zeros(2, dtype=torch.int64, device=runner.device)
    builder = PieceCompilation(
        runner.model,
        compilation,
        {"input_ids_T": ids_T, "positions_T": ids_T.clone()},
        runner.backend.splitting_ops,
        runner.library,
        runner.bundle_key,
        account=account,
    )
    stored = StoredPieces(runner.library, runner.bundle_key, (name,), sizes)
    flight = PieceFlight(leases, config.artifacts.build_wait_s, account)
    pieces = flight(runner.bundle_key.digest, stored.find, lambda: builder.build(name), builder.publish)
    if stored.find() is None:
        # A replica can do without its pieces in the store; this command is there for nothing else.
        raise ConfigError("The store did not take the pieces; the log says why.", param="artifacts")
    builds = pieces.builds(sizes)
    num_bytes = sum(build.num_bytes for build in builds)
    return WarmedFormat(name, pieces.is_warm, round(time.perf_counter() - started, 3), len(builds), num_bytes)
