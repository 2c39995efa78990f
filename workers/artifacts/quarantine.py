"""Marks for the whole fleet: this manifest is bad and why; building this key failed and until when nobody tries again.

A mark can only keep something from being used, so marks need no signature: who can write to a store could as well
delete what is in it. They are written once and never changed; taking one back deletes it. Knows stores and marks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from workers.artifacts.digest import canonical_json, is_sha256
from workers.artifacts.errors import Refusal, RefusedError, StoreError
from workers.artifacts.names import FAILURES, QUARANTINE, key_of, last_part
from workers.artifacts.stores.base import ArtifactStore

logger = logging.getLogger(__name__)

_MAX_MARK_BYTES = 1 << 16
_MAX_MARKS = 64
_MAX_TEXT = 2000

#: Reasons that building again does not cure for sure: the code itself was wrong.
CODE_FAULTS = frozenset({Refusal.STRUCTURE, Refusal.SELF_CHECK})

#: How many manifests of a key may have such a fault before nobody builds it again.
MAX_CODE_FAULTS = 2

Mark = TypeVar("Mark", bound="QuarantineMark | FailureMark")


@dataclasses.dataclass(frozen=True, slots=True)
class QuarantineMark:
    """A manifest that must not be used.

    Attributes:
        manifest: Its digest, or the name under which it was found.
        text: What happened, for people.
        blobs: Blobs that must not be used in any other manifest either.
        created_s: Seconds since the epoch.
    """

    key: str
    manifest: str
    reason: Refusal
    text: str
    blobs: tuple[str, ...] = ()
    created_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class FailureMark:
    """A build that failed.

    Attributes:
        until_s: Seconds since the epoch; before that, replicas serve eagerly instead of trying again.
    """

    key: str
    text: str
    created_s: float
    until_s: float


class MarkBoard:
    """The marks in a store, and those of this process that the store did not take.

    Args:
        store: Errors of it are the caller's, on reading; on writing they are logged.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._own: dict[str, bytes] = {}

    def quarantine(self, key: str, manifests: Iterable[str], reason: Refusal, text: str, blobs: Iterable[str]) -> None:
        """Mark manifests; those that have a mark keep it."""
        for manifest in manifests:
            mark = QuarantineMark(key, manifest, reason, text[:_MAX_TEXT], tuple(blobs), time.time())
            logger.error("quarantined %s of key %s (%s): %s", manifest[:16], key[:16], reason, text)
            self._write(f"{QUARANTINE}{key}/{manifest}", mark)

    def quarantined(self, key: str = "") -> list[QuarantineMark]:
        """The marks of a key, or of all.

        Raises:
            StoreError: They cannot be read.
        """
        prefix = f"{QUARANTINE}{key}/" if key else QUARANTINE
        marks = []
        for name, data in self._read(prefix):
            # A mark that cannot be read still marks: its name says what.
            fields = _fields(data)
            blobs = fields.get("blobs", [])
            known = {reason.value: reason for reason in Refusal}
            marks.append(
                QuarantineMark(
                    key_of(name),
                    last_part(name),
                    known.get(str(fields.get("reason")), Refusal.MALFORMED),
                    str(fields.get("text", "the mark itself is not readable"))[:_MAX_TEXT],
                    tuple(filter(is_sha256, blobs)) if isinstance(blobs, list) else (),
                    _number(fields.get("created_s")),
                )
            )
        return marks

    def lift_quarantine(self, key: str, manifest: str) -> None:
        """Take a mark back.

        Raises:
            StoreError: The store is in trouble.
        """
        name = f"{QUARANTINE}{key}/{manifest}"
        self._own.pop(name, None)
        self._store.delete(name)

    def remember_failure(self, key: str, text: str, ttl_s: float) -> None:
        """Have nobody build this key for a while."""
        now_s = time.time()
        mark = FailureMark(key, text[:_MAX_TEXT], now_s, now_s + ttl_s)
        logger.error("building key %s failed; not tried again for %.0f s: %s", key[:16], ttl_s, text)
        self._write(f"{FAILURES}{key}/{int(now_s * 1000)}", mark)

    def recent_failure(self, key: str, ttl_s: float) -> FailureMark | None:
        """A failure that is not over yet; no clock can make one last longer than ``ttl_s`` from now.

        Raises:
            StoreError: They cannot be read.
        """
        now_s = time.time()
        for _, data in self._read(f"{FAILURES}{key}/"):
            fields = _fields(data)
            until_s = _number(fields.get("until_s"))
            if now_s < until_s <= now_s + ttl_s:
                return FailureMark(key, str(fields.get("text", ""))[:_MAX_TEXT], _number(fields["created_s"]), until_s)
        return None

    def forget_failures(self, key: str) -> None:
        """Let the next replica try.

        Raises:
            StoreError: The store is in trouble.
        """
        for name in [name for name in self._own if name.startswith(f"{FAILURES}{key}/")]:
            del self._own[name]
        for item in self._store.list(f"{FAILURES}{key}/"):
            self._store.delete(item.name)

    def _write(self, name: str, mark: QuarantineMark | FailureMark) -> None:
        data = canonical_json(dataclasses.asdict(mark))
        self._own.setdefault(name, data)
        try:
            self._store.put_if_absent(name, data)
        except StoreError as error:
            logger.warning("the mark holds in this process only: %s", error)

    def _read(self, prefix: str) -> list[tuple[str, bytes]]:
        marks = {name: data for name, data in self._own.items() if name.startswith(prefix)}
        newest = sorted(self._store.list(prefix), key=lambda item: -item.modified_s)
        for item in newest[:_MAX_MARKS] if prefix != QUARANTINE else newest:
            if item.name not in marks:
                try:
                    marks[item.name] = self._store.get(item.name, _MAX_MARK_BYTES) or b""
                except RefusedError:
                    marks[item.name] = b""
        return sorted(marks.items())


def code_faults(marks: Collection[QuarantineMark]) -> int:
    """How many manifests had code that was wrong."""
    return sum(mark.reason in CODE_FAULTS for mark in marks)


def _fields(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
