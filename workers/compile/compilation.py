"""One model's pieces: found in a library, or built and published there.

Each step is a method of its own, so that whoever coordinates builds of several processes can put itself in between
(:data:`BuildFlight`). Knows the order of the steps; how a piece is compiled is its format's business, what is trusted
the library's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from workers.artifacts.errors import RefusedError, StoreError
from workers.artifacts.key import BundleKey
from workers.artifacts.library import ArtifactLibrary, Lookup
from workers.compile import torch_compat
from workers.compile.counters import CompileCounters
from workers.compile.decorator import dynamic_arg_dims
from workers.compile.errors import BuildFailedError, CompileError, UnlinkablePieceError
from workers.compile.formats.base import make_format
from workers.compile.key import PIECE_SECTIONS, inductor_options
from workers.compile.passes.standard import standard_passes
from workers.compile.piece_set import PieceSet, build_of, publish
from workers.compile.plan import Plan
from workers.compile.prefetch import wait_for_compiler
from workers.compile.stored import StoredPieces
from workers.compile.transient import is_transient
from workers.config import CompilationConfig
from workers.startup.account import StartupAccount

if TYPE_CHECKING:
    from workers.compile.compiler import SplitModel

logger = logging.getLogger(__name__)


class BuildFlight(Protocol):
    """Finds, waits for, or has built: decides who of several processes builds."""

    def __call__(
        self,
        name: str,
        find: Callable[[], PieceSet | None],
        build: Callable[[], PieceSet],
        publish: Callable[[PieceSet], bool],
    ) -> PieceSet:
        """The pieces called ``name``; raises what ``find`` and ``build`` raise."""


def build_alone(
    name: str,
    find: Callable[[], PieceSet | None],
    build: Callable[[], PieceSet],
    publish: Callable[[PieceSet], bool],
) -> PieceSet:
    """Without regard to others: find, or build and publish."""
    found = find()
    if found is None:
        found = build()
        publish(found)
    return found


class PieceCompilation:
    """Everything that decides what a model's pieces are, and where they are kept.

    Args:
        model: See :func:`workers.compile.compile_model`, as for the rest.
        key: Under which its bundle is kept.
        account: Where a start is written down.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CompilationConfig,
        example_args: Mapping[str, torch.Tensor],
        splitting_ops: Sequence[str],
        library: ArtifactLibrary,
        key: BundleKey,
        counters: CompileCounters | None = None,
        account: StartupAccount | None = None,
    ) -> None:
        self.library = library
        self.key = key
        self.sizes = config.all_sizes()
        self._model = model
        self._config = config
        self._example_args = example_args
        self._splitting_ops = splitting_ops
        self._formats = config.piece_formats(next(iter(example_args.values())).device.type)
        self._stored = StoredPieces(library, key, self._formats, self.sizes)
        self._counters = counters if counters is not None else CompileCounters()
        self._account = account or StartupAccount()

    @property
    def lookup(self) -> Lookup | None:
        """The library's last answer; None before :meth:`find`."""
        return self._stored.lookup

    def find(self) -> PieceSet | None:
        """See :meth:`StoredPieces.find`."""
        with self._account.phase("find"):
            return self._stored.find()

    def build(self, piece_format: str | None = None) -> PieceSet:
        """Trace, and compile what neither the bundle nor any other bundle of equal conditions has.

        Args:
            piece_format: None takes the one that is ready first.

        Raises:
            CompileError: The model does not trace, or an option is wrong.
            BuildFailedError: The compiler failed, now or recently; or this machine is short of something.
        """
        if (failure := self.library.recent_failure(self.key)) is not None:
            raise BuildFailedError(
                "Compiling failed recently and is not tried again yet"
                f" (`warmgraph artifacts quarantine {self.key.digest[:12]} --lift` forgets it): {failure.text}"
            )
        with self.library.building(self.key):
            return self._build_or_remember(piece_format or self._formats[-1])

    def publish(self, pieces: PieceSet) -> bool:
        """Put what was built into the library; whether it took it."""
        return publish(self.library, self.key, pieces)

    def split(self) -> SplitModel:
        """Trace and split; compiles nothing."""
        from workers.compile.compiler import split_model

        return split_model(
            self._model,
            self._example_args,
            dynamic_arg_dims(self._model),
            splitting_ops=self._splitting_ops,
            passes=standard_passes(self._config.pass_config, self._splitting_ops),
            factors=self.key.graph,
            counters=self._counters,
        )

    def stored_plan(self) -> Plan | None:
        """The plan with all its builds, if the library has it."""
        return self._stored.read()[0]

    def _build_or_remember(self, piece_format: str) -> PieceSet:
        try:
            return self._build(piece_format)
        except CompileError as error:
            if isinstance(error, UnlinkablePieceError | BuildFailedError):
                self._remember(error)
                raise BuildFailedError(str(error)) from error
            raise
        except Exception as error:
            # A compiler can fail in any way; a replica has to start all the same.
            if is_transient(error):
                message = f"Compiling failed for want of something on this machine, not remembered: {_summary(error)}"
                raise BuildFailedError(message) from error
            self._remember(error)
            raise BuildFailedError(f"The compiler failed: {_summary(error)}") from error

    def _build(self, piece_format: str) -> PieceSet:
        wait_for_compiler(only_if_begun=piece_format == "fx")
        from workers.compile.compiler import build_pieces
        from workers.compile.probes import record_probes

        options, size_options = inductor_options(self._config), self._config.inductor_compile_config_for_sizes
        if piece_format != "fx":
            torch_compat.check_inductor_options([*options, *(size_options or ())])
        elif self._config.inductor_compile_config or size_options:
            logger.warning("fx pieces run as they are: Inductor options are for the formats that are built later")
        with self._account.phase("trace"):
            split = self.split()
        # Read after the trace: another process may have added builds meanwhile.
        stored, lookup = self._stored.read()
        pieces = PieceSet(split.plan, piece_format, self.library, lookup.bundle if stored else None)
        if stored is not None:
            for key, record in split.plan.pieces.items():
                record.builds = stored.pieces[key].builds if key in stored.pieces else []
        self._take_over(pieces, lookup.bad_blobs)
        # The sources come first: whoever finds them can build any other format.
        num_sources = build_pieces(split.plan, split.sources, make_format("fx"), pieces.blobs, account=self._account)
        builder = make_format(piece_format, options, size_options)
        num_built = build_pieces(split.plan, split.sources, builder, pieces.blobs, self.sizes, self._account)
        self._counters.num_compiled += num_built + (num_sources if piece_format == "fx" else 0)
        if not lookup.bad_blobs.isdisjoint(pieces.blobs):
            raise BuildFailedError("What was built is, to the byte, what is in quarantine.")
        pieces.probes = {size: record_probes(split.graphs, size) for size in self.sizes}
        return pieces

    def _take_over(self, pieces: PieceSet, bad_blobs: Collection[str]) -> None:
        """Copy builds of equal pieces from bundles of other models."""
        wanted = {
            (key, pieces.piece_format, size)
            for key, record in pieces.plan.pieces.items()
            for size in self.sizes
            if record.find_build(pieces.piece_format, size) is None
        }
        if not wanted:
            return
        for bundle, entry in self.library.find_builds(self.key, PIECE_SECTIONS):
            slot = (entry.name, entry.format, entry.size)
            if slot in wanted and entry.sha256 not in bad_blobs:
                try:
                    pieces.blobs[entry.sha256] = self.library.read(bundle, entry)
                except (RefusedError, StoreError):
                    continue
                pieces.plan.pieces[entry.name].builds.append(build_of(entry))
                wanted.remove(slot)
                self._counters.num_shared += 1

    def _remember(self, error: Exception) -> None:
        self.library.remember_failure(self.key, _summary(error))


def _summary(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
