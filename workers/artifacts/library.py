"""The bundles of a store under a trust policy: looked up, read, published, quarantined.

Puts stores, keys, manifests and marks together and keeps their order: manifest, signature, key, and only then the bytes
of blobs against their digests. Nothing is unpickled, imported or loaded here. Trouble with a store is an outcome and
not an error: an engine starts without one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import importlib.metadata
import logging
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from workers.artifacts.bundle import Bundle, unite
from workers.artifacts.counters import ArtifactCounters
from workers.artifacts.digest import sha256
from workers.artifacts.errors import Refusal, RefusedError, StoreError
from workers.artifacts.explain import Explanation, explain
from workers.artifacts.key import BundleKey
from workers.artifacts.manifest import PAYLOAD_TYPE, Entry, Kind, Manifest, Slot
from workers.artifacts.names import BUILDS, BUNDLES, USES, blob_name, key_of, last_part, manifest_prefix
from workers.artifacts.quarantine import MAX_CODE_FAULTS, FailureMark, MarkBoard, code_faults
from workers.artifacts.reader import VerifiedReader
from workers.artifacts.signing import seal
from workers.artifacts.stores.base import ArtifactStore, StoredObject
from workers.artifacts.stores.factory import open_store
from workers.artifacts.stores.memory import MemoryStore
from workers.artifacts.trust import Trust
from workers.checkpoint.cache import artifacts_root
from workers.config import ArtifactConfig

logger = logging.getLogger(__name__)


def _version() -> str:
    try:
        return importlib.metadata.version("warmgraph")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed


#: Stands in every manifest that this code writes.
CREATOR = f"warmgraph {_version()}"

#: Bundles that a missing one is compared with, the newest first.
_MAX_CANDIDATES = 64

#: Kinds of which there may be one per host or setting, and how many of each are kept: those changed last.
_BOUNDED_KINDS = {Kind.HISTOGRAM: 32, Kind.MEMORY_PLAN: 32}

#: Refusals that say that the manifest itself is bad, whoever looks at it; the others depend on who looks.
_OBJECTIVE = frozenset({Refusal.MALFORMED, Refusal.TOO_LARGE, Refusal.BAD_SIGNATURE, Refusal.WRONG_KEY})


class Outcome(enum.StrEnum):
    """What came of looking for a bundle; the value is a metric's label."""

    HIT = "hit"
    ABSENT = "absent"
    """There is none for this key."""
    REFUSED = "refused"
    """There is one, and it is not trusted or damaged."""
    QUARANTINED = "quarantined"
    """All there were are marked bad; may be built once more."""
    BLOCKED = "blocked"
    """Built twice and wrong twice: not built again until somebody lifts the quarantine."""
    UNAVAILABLE = "unavailable"
    """The store is in trouble."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lookup:
    """The answer to :meth:`ArtifactLibrary.open`.

    Attributes:
        bundle: Verified down to its manifests; None unless the outcome is HIT.
        explanation: On a miss, the nearest bundle, if it is known.
        bad_blobs: Digests of what was built for this key and must not be used.
        seconds: What looking took.
    """

    outcome: Outcome
    bundle: Bundle | None = None
    explanation: Explanation | None = None
    bad_blobs: frozenset[str] = frozenset()
    seconds: float = 0.0

    @property
    def differing(self) -> tuple[str, ...]:
        """Names of the factors in which the nearest bundle differs."""
        return tuple(item.name for item in self.explanation.graph) if self.explanation else ()


@dataclasses.dataclass(frozen=True, slots=True)
class Addition:
    """Something to publish; fields as in :class:`workers.artifacts.manifest.Entry`."""

    kind: Kind
    name: str
    data: bytes
    format: str | None = None
    size: int | None = None
    seconds: float = 0.0


class ArtifactLibrary:
    """See the module.

    Args:
        store: Where bundles lie.
        trust: Whose are used, and as whom is published.
        config: Limits and switches.

    Attributes:
        counters: Kept up to date.
        reader: Reads manifests and blobs and marks nothing.
        marks: Of the fleet.
    """

    def __init__(
        self, store: ArtifactStore, trust: Trust, config: ArtifactConfig, counters: ArtifactCounters | None = None
    ) -> None:
        self.store = store
        self.trust = trust
        self.config = config
        self.counters = counters or ArtifactCounters()
        self.reader = VerifiedReader(store, trust, config)
        self.marks = MarkBoard(store)
        self._answers: dict[str, Lookup] = {}
        self._builds: dict[str, str] = {}

    @classmethod
    def in_memory(cls) -> Self:
        """A library that ends with its process."""
        return cls(MemoryStore(), Trust("none"), ArtifactConfig(store=None, trust="none"))

    @classmethod
    def from_config(cls, config: ArtifactConfig, folder: Path | None = None) -> Self:
        """The library that a config describes.

        Args:
            folder: The user's artifact folder, if it is not the usual one.

        Raises:
            ConfigError: The store's URL, or a key, is wrong.
        """
        if config.store is None:
            return cls.in_memory()
        folder = folder or artifacts_root()
        trust = Trust.from_config(config, folder)
        counters = ArtifactCounters()
        store = open_store(config, folder, on_failure=lambda direction: counters.store_failures.update([direction]))
        return cls(store, trust, config, counters)

    def open(self, key: BundleKey) -> Lookup:
        """Look for a bundle and verify its manifests; fetches no blob.

        May be asked again and again: what is counted, logged and explained is that the answer changed.
        """
        started = time.perf_counter()
        try:
            lookup = self.open_digest(key.digest)
            last = self._answers.get(key.digest)
            if lookup.bundle is None:
                is_known = last is not None and last.outcome is lookup.outcome
                explanation = last.explanation if last is not None and is_known else self.explain(key)
                lookup = dataclasses.replace(lookup, explanation=explanation)
        except StoreError as error:
            logger.warning("artifact store: %s", error)
            lookup = Lookup(Outcome.UNAVAILABLE)
        lookup = dataclasses.replace(lookup, seconds=time.perf_counter() - started)
        self._note_answer(key.digest, lookup)
        return lookup

    def peek(self, key: BundleKey) -> Bundle | None:
        """:meth:`open` for whoever wants something small beside the pieces: a miss is not counted, nor explained."""
        try:
            return self.open_digest(key.digest).bundle
        except StoreError as error:
            logger.warning("artifact store: %s", error)
            return None

    def read(self, bundle: Bundle, entry: Entry) -> bytes:
        """The bytes of an entry, compared with its digest.

        Raises:
            RefusedError: They are missing, others, or too many; the bundle has been quarantined.
            StoreError: The store is in trouble.
        """
        try:
            data = self.reader.blob(entry)
        except RefusedError as error:
            if error.reason is Refusal.DAMAGED_BLOB:
                self._remove_damaged(entry)
            self.quarantine(bundle, error.reason, f"{entry.kind} {entry.name}: {error}")
            raise
        self.counters.num_fetched += 1
        self.counters.bytes_fetched += len(data)
        return data

    def publish(self, key: BundleKey, additions: Sequence[Addition], base: Bundle | None = None) -> Bundle | None:
        """Write blobs, then one manifest with them and with everything of ``base``.

        Args:
            base: What was found or published before.

        Returns:
            The new bundle; None if this process may not publish, or the store did not take it.
        """
        if not self._may_publish:
            return None
        try:
            return self._publish(key, additions, base)
        except StoreError as error:
            logger.warning("not published: %s", error)
            return None

    @contextlib.contextmanager
    def building(self, key: BundleKey) -> Iterator[None]:
        """Around building: garbage collection stays away from this key, until :meth:`end_build` if anything was built.

        The lease may be held in a place that whoever collects does not see, so this mark lies in the store itself. One
        that is left behind, because its builder died or did not get to publish, counts for an hour
        (:mod:`workers.artifacts.gc`).
        """
        if not self._may_publish:
            yield
            return
        name = self._builds.setdefault(key.digest, f"{BUILDS}{key.digest}/{uuid.uuid4().hex}")
        try:
            self.store.put_if_absent(name, b"")
        except StoreError as error:
            logger.warning("the build is not marked in the store: %s", error)
        try:
            yield
        except BaseException:
            self.end_build(key)
            raise

    def end_build(self, key: BundleKey) -> None:
        """What was built is in the store, or the store did not take it."""
        name = self._builds.pop(key.digest, None)
        if name is None:
            return
        try:
            self.store.delete(name)
        except StoreError as error:
            logger.warning("the mark of a build stays behind: %s", error)

    @property
    def _may_publish(self) -> bool:
        return self.config.publish and self.trust.may_publish

    def quarantine(self, bundle: Bundle, reason: Refusal, text: str, blobs: Iterable[str] = ()) -> None:
        """Mark a bundle bad for the whole fleet.

        Args:
            blobs: Digests that must not be used in another bundle of this key either.
        """
        self.counters.refusals[reason.value] += 1
        self.marks.quarantine(bundle.key, bundle.heads, reason, text, blobs)

    def remember_failure(self, key: BundleKey, text: str) -> None:
        """Have nobody in the fleet build this key for a while."""
        self.counters.num_build_failures += 1
        self.marks.remember_failure(key.digest, text, self.config.failure_ttl_s)

    def recent_failure(self, key: BundleKey) -> FailureMark | None:
        """A failure of this key that is still remembered."""
        try:
            return self.marks.recent_failure(key.digest, self.config.failure_ttl_s)
        except StoreError:
            return None

    def explain(self, key: BundleKey) -> Explanation:
        """Which factors keep the nearest bundle from being used.

        Raises:
            StoreError: The store is in trouble.
        """
        candidates: dict[str, Mapping[str, Mapping[str, Any]]] = {}
        for found_key, manifest in self._newest_manifests():
            candidates.setdefault(found_key, manifest.factors)
        return explain(key, candidates)

    def find_builds(self, key: BundleKey, sections: Iterable[str]) -> Iterator[tuple[Bundle, Entry]]:
        """Pieces of other bundles that were made under the same conditions.

        Args:
            sections: The graph-affecting factors that a compiled piece depends on besides its own key.
        """
        wanted = {name: key.graph.get(name) for name in sections}
        try:
            for _, manifest in self._newest_manifests():
                graph = manifest.factors["graph"]
                if manifest.key != key.digest and {name: graph.get(name) for name in wanted} == wanted:
                    bundle = self.open_digest(manifest.key).bundle
                    yield from ((bundle, entry) for entry in bundle.find(Kind.PIECE)) if bundle else ()
        except StoreError as error:
            logger.warning("artifact store: %s", error)

    def open_digest(self, key: str) -> Lookup:
        """As :meth:`open`, for a key of which only the digest is known; says nothing of the nearest bundle.

        Raises:
            StoreError: The store is in trouble.
        """
        marks = {mark.manifest: mark for mark in self.marks.quarantined(key)}
        good: dict[str, Manifest] = {}
        num_refused = 0
        for item, found in self.reader.manifests(key):
            if last_part(item.name) in marks:
                continue
            if isinstance(found, Manifest):
                good[last_part(item.name)] = found
                continue
            num_refused += 1
            self.counters.refusals[found.reason.value] += 1
            logger.warning("manifest %s is not used: %s", item.name, found)
            if found.reason in _OBJECTIVE:
                self.marks.quarantine(key, [last_part(item.name)], found.reason, str(found), ())
        bad_blobs = frozenset(blob for mark in marks.values() for blob in mark.blobs)
        bundle = unite(good, is_trusted=self.trust.vouches, bad_blobs=bad_blobs)
        if bundle is not None and bundle.first(Kind.PLAN) is not None:
            return Lookup(Outcome.HIT, bundle, bad_blobs=bad_blobs)
        if code_faults(marks.values()) >= MAX_CODE_FAULTS:
            return Lookup(Outcome.BLOCKED)
        if marks:
            return Lookup(Outcome.QUARANTINED, bad_blobs=bad_blobs)
        return Lookup(Outcome.REFUSED if num_refused else Outcome.ABSENT)

    def _note_answer(self, key: str, lookup: Lookup) -> None:
        last, self._answers[key] = self._answers.get(key), lookup
        if last is not None and last.outcome is lookup.outcome:
            return
        self.counters.lookups[lookup.outcome.value] += 1
        if lookup.bundle is not None:
            self._note_use(key)
        elif lookup.explanation is not None:
            self.counters.misses[lookup.explanation.label] += 1
            logger.info("no bundle (%s): %s", lookup.outcome, lookup.explanation.sentence())

    def _remove_damaged(self, entry: Entry) -> None:
        """So that whoever builds it again can write it."""
        try:
            self.store.delete(blob_name(entry.sha256))
        except StoreError as error:
            logger.warning("the damaged blob stays in the store: %s", error)

    def _publish(self, key: BundleKey, additions: Sequence[Addition], base: Bundle | None) -> Bundle:
        signer = self.trust.signer
        origin = signer.key_id if signer else None
        num_bytes = 0
        slots = {entry.slot: entry for entry in base.entries} if base else {}
        for addition in additions:
            fields = {field.name: getattr(addition, field.name) for field in dataclasses.fields(addition)}
            data = fields.pop("data")
            entry = Entry(**fields, sha256=sha256(data), num_bytes=len(data), origin=origin)
            slots.pop(entry.slot, None)  # so that slots are in the order of their last change
            slots[entry.slot] = entry
            num_bytes += self._put_blob(entry, data)
        _forget_oldest(slots)
        factors = {"graph": dict(key.graph), "capture": dict(key.capture), "runtime": dict(key.runtime)}
        heads = base.heads if base else ()
        manifest = Manifest(key.digest, factors, tuple(slots.values()), time.time(), heads, CREATOR)
        envelope = seal(manifest.to_payload(), PAYLOAD_TYPE, signer)
        digest = sha256(envelope)
        self.store.put_if_absent(f"{manifest_prefix(key.digest)}{digest}", envelope)
        self.counters.num_published += 1
        self.counters.bytes_published += num_bytes
        logger.info("published %s of key %s: %d entries", digest[:16], key.digest[:16], len(slots))
        return Bundle(key.digest, factors, manifest.entries, (digest,), manifest.created_s)

    def _put_blob(self, entry: Entry, data: bytes) -> int:
        """Write a blob; one that is there already must be the same. Returns the bytes written."""
        name = blob_name(entry.sha256)
        if self.store.put_if_absent(name, data):
            return len(data)
        try:
            if self.store.get(name, len(data)) == data:
                return 0
        except RefusedError:
            pass
        self.store.delete(name)
        self.store.put_if_absent(name, data)
        return len(data)

    def _newest_manifests(self) -> Iterator[tuple[str, Manifest]]:
        """A verified manifest of each of the newest keys."""
        newest: dict[str, StoredObject] = {}
        for item in self.store.list(BUNDLES):
            held = newest.get(key_of(item.name))
            if held is None or item.modified_s > held.modified_s:
                newest[key_of(item.name)] = item
        for key, item in sorted(newest.items(), key=lambda pair: -pair[1].modified_s)[:_MAX_CANDIDATES]:
            try:
                yield key, self.reader.manifest(item, key)
            except RefusedError:
                continue

    def _note_use(self, key: str) -> None:
        """Once a day and key, for garbage collection; nobody waits for it."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()

        def write() -> None:
            try:
                self.store.put_if_absent(f"{USES}{key}/{today}", b"")
            except (StoreError, RefusedError) as error:
                logger.debug("use of %s not noted: %s", key, error)

        threading.Thread(target=write, name="artifact-use", daemon=True).start()


def _forget_oldest(slots: dict[Slot, Entry]) -> None:
    for kind, limit in _BOUNDED_KINDS.items():
        of_kind = [slot for slot in slots if slot[0] is kind]
        for slot in of_kind[:-limit]:
            del slots[slot]
