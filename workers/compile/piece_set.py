"""A plan and the bytes of its pieces: as a bundle keeps them, and as they were just built.

In a bundle the plan is stored without its builds, so it is the same whoever built what; every build is an entry of its
own. Knows how the two are told apart; nothing of signatures or of what the bytes do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping

from workers.artifacts.bundle import Bundle
from workers.artifacts.key import BundleKey
from workers.artifacts.library import Addition, ArtifactLibrary
from workers.artifacts.manifest import Entry, Kind
from workers.compile.errors import PlanMismatchError
from workers.compile.plan import Build, PieceRecord, Plan

#: Name of the plan's entry.
PLAN_NAME = "plan"

#: Name of the entry that says what pieces give for fixed inputs.
PROBES_NAME = "pieces"


@dataclasses.dataclass(slots=True)
class PieceSet:
    """What a model runs from.

    Attributes:
        plan: With the builds that there are.
        piece_format: The one to load.
        library: Where builds come from that were not made here.
        bundle: Where the plan came from, or where it went; None if it is in this process only.
        is_warm: Whether all of it was found.
        blobs: Builds that were made or fetched, by digest.
        probes: What pieces give for fixed inputs, by batch size; see :mod:`workers.compile.probes`.
        fetch_seconds: What fetching took.
    """

    plan: Plan
    piece_format: str
    library: ArtifactLibrary
    bundle: Bundle | None = None
    is_warm: bool = False
    blobs: dict[str, bytes] = dataclasses.field(default_factory=dict)
    probes: dict[int | None, bytes] = dataclasses.field(default_factory=dict)
    fetch_seconds: float = 0.0

    def fetch(self, sizes: Iterable[int | None]) -> None:
        """Have the bytes of every build that is loaded, verified, before the first of them is.

        Raises:
            PlanMismatchError: There is no such build.
            RefusedError: Bytes are missing or damaged; the bundle has been quarantined.
            StoreError: The store is in trouble.
        """
        started, wanted = time.perf_counter(), list(sizes)
        for build in self.builds(wanted):
            if build.sha256 not in self.blobs:
                assert self.bundle is not None
                entry = next(entry for entry in self.bundle.find(Kind.PIECE) if entry.sha256 == build.sha256)
                self.blobs[build.sha256] = self.library.read(self.bundle, entry)
        if self.bundle is not None:
            for entry in self.bundle.find(Kind.SELF_CHECK, PROBES_NAME):
                if entry.size in wanted and entry.size not in self.probes:
                    self.probes[entry.size] = self.library.read(self.bundle, entry)
        self.fetch_seconds += time.perf_counter() - started

    def sources(self) -> dict[str, bytes]:
        """What each piece computes, by its key, verified.

        Raises:
            PlanMismatchError: There is none.
            RefusedError: Bytes are missing or damaged; the bundle has been quarantined.
            StoreError: The store is in trouble.
        """
        of_sources = dataclasses.replace(self, piece_format="fx")
        of_sources.fetch([None])
        return {
            key: self.blobs[build.sha256]
            for key, build in zip(self.plan.pieces, of_sources.builds([None]), strict=True)
        }

    def builds(self, sizes: Iterable[int | None]) -> list[Build]:
        """The builds that this set loads.

        Raises:
            PlanMismatchError: One is missing.
        """
        found = []
        for size in sizes:
            for key, record in self.plan.pieces.items():
                build = record.find_build(self.piece_format, size)
                if build is None:
                    what = "every size" if size is None else f"size {size}"
                    raise PlanMismatchError(f"The plan has no {self.piece_format} build of piece {key} for {what}.")
                found.append(build)
        return found

    def build_seconds(self, sizes: Iterable[int | None]) -> float:
        """What tracing and these builds took whoever made them."""
        return self.plan.trace_seconds + sum(build.seconds for build in self.builds(sizes))


def read_plan(library: ArtifactLibrary, bundle: Bundle) -> Plan:
    """The plan of a bundle, with the builds of the bundle.

    Raises:
        PlanMismatchError: It is malformed.
        RefusedError: It is damaged; the bundle has been quarantined.
        StoreError: The store is in trouble.
    """
    entry = bundle.first(Kind.PLAN, PLAN_NAME)
    if entry is None:
        raise PlanMismatchError("The bundle has no plan.")
    plan = Plan.from_json(library.read(bundle, entry))
    plan.trace_seconds = entry.seconds
    for key, record in plan.pieces.items():
        record.builds = [build_of(found) for found in bundle.find(Kind.PIECE, key)]
    return plan


def build_of(entry: Entry) -> Build:
    """A bundle's entry as the plan knows it."""
    assert entry.format is not None
    return Build(entry.format, entry.size, entry.sha256, entry.num_bytes, entry.seconds)


def additions(plan: Plan, blobs: Mapping[str, bytes], probes: Mapping[int | None, bytes]) -> list[Addition]:
    """What a bundle gains by a plan, the builds that were made for it, and what they should give."""
    found = [Addition(Kind.PLAN, PLAN_NAME, plan_bytes(plan), seconds=plan.trace_seconds)]
    for key, record in plan.pieces.items():
        for build in record.builds:
            if build.sha256 in blobs:
                data = blobs[build.sha256]
                found.append(Addition(Kind.PIECE, key, data, build.format, build.size, build.seconds))
    found += [Addition(Kind.SELF_CHECK, PROBES_NAME, data, size=size) for size, data in probes.items()]
    return found


def publish(library: ArtifactLibrary, key: BundleKey, pieces: PieceSet) -> bool:
    """Put what was built into a library, which ends the build; whether it took it."""
    added = additions(pieces.plan, pieces.blobs, pieces.probes)
    try:
        published = library.publish(key, added, pieces.bundle)
    finally:
        library.end_build(key)
    if published is not None:
        pieces.bundle = published
    return published is not None


def plan_bytes(plan: Plan) -> bytes:
    """The plan as it is stored: without builds, which are entries of their own."""
    pieces = {key: PieceRecord(record.ops, record.inputs) for key, record in plan.pieces.items()}
    return dataclasses.replace(plan, pieces=pieces, trace_seconds=0.0).to_json().encode()
