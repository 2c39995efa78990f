"""The histogram of batch sizes that ``cudagraph_capture_sizes: auto`` learns from.

Replicas record into their own and share them, so the JSON form carries a version and a checksum and is checked before
it is believed. Knows nothing about where it is kept (``traffic``) or how sizes are chosen from it (``choose``).
"""

from __future__ import annotations

import collections
import hashlib
import json
from typing import Any, Protocol, Self

from workers.errors import WarmgraphError

FORMAT_NAME = "warmgraph-batch-histogram"
FORMAT_VERSION = 1

#: Counts are halved when their sum passes this, so that old traffic fades and the numbers stay small.
MAX_BATCHES = 1 << 24

#: Larger batches, and longer documents, are nothing that an engine records.
MAX_SIZE = 1 << 20
MAX_JSON_BYTES = 4 << 20


class HistogramError(WarmgraphError):
    """The bytes are not a batch histogram that this version can read."""


class RecordsBatches(Protocol):
    """Whatever wants to know about every batch."""

    def record(self, num_reqs: int, num_tokens: int, *, is_decode: bool) -> None:
        """One batch of at least one token was run."""


class BatchHistogram:
    """How many batches of each size were run.

    Attributes:
        decode: Pure decode batches by number of requests.
        mixed: All other batches by number of tokens.
    """

    def __init__(self) -> None:
        self.decode: collections.Counter[int] = collections.Counter()
        self.mixed: collections.Counter[int] = collections.Counter()
        self._num_batches = 0

    def record(self, num_reqs: int, num_tokens: int, *, is_decode: bool) -> None:
        """Count one batch of at least one token."""
        assert num_tokens > 0
        if is_decode:
            self.decode[num_reqs] += 1
        else:
            self.mixed[num_tokens] += 1
        self._num_batches += 1
        self._fade()

    def merge(self, other: BatchHistogram) -> None:
        """Add the counts of another histogram; which of the two is merged into which makes no difference."""
        self.decode.update(other.decode)
        self.mixed.update(other.mixed)
        self._num_batches += other._num_batches
        self._fade()

    @property
    def num_batches(self) -> int:
        """Batches counted (after halving)."""
        return self._num_batches

    def token_counts(self, query_len: int = 1) -> collections.Counter[int]:
        """Batches by number of tokens, where a decode batch brings ``query_len`` tokens per request."""
        counts = collections.Counter(dict(self.mixed))
        for num_reqs, count in list(self.decode.items()):
            counts[num_reqs * query_len] += count
        return counts

    def to_json(self) -> str:
        """JSON with a version and a checksum, in ASCII; equal histograms give equal text."""
        counts = {"decode": _to_json(self.decode), "mixed": _to_json(self.mixed)}
        document = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "sha256": _checksum(counts),
            **counts,
        }
        return _canonical(document)

    @classmethod
    def from_json(cls, data: str | bytes) -> Self:
        """Read what :meth:`to_json` wrote; any other bytes are refused.

        Raises:
            HistogramError: Too long, not JSON, another format or version, damaged, or with impossible counts.
        """
        document = _parse(data)
        if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
            raise HistogramError(f"the bytes are not a batch histogram: no format {FORMAT_NAME!r}")
        if document.get("version") != FORMAT_VERSION:
            raise HistogramError(
                f"the batch histogram has version {document.get('version')!r:.40}, this one reads {FORMAT_VERSION}"
            )
        counts = {name: document.get(name) for name in ("decode", "mixed")}
        histogram = cls()
        histogram.decode = _from_json(counts["decode"])
        histogram.mixed = _from_json(counts["mixed"])
        if document.get("sha256") != _checksum(counts):
            raise HistogramError("the batch histogram is damaged: its checksum does not match")
        histogram._num_batches = histogram.decode.total() + histogram.mixed.total()
        histogram._fade()
        return histogram

    def _fade(self) -> None:
        while self._num_batches > MAX_BATCHES:
            for counts in (self.decode, self.mixed):
                for size in list(counts):
                    counts[size] //= 2
                    if counts[size] == 0:
                        del counts[size]
            self._num_batches = self.decode.total() + self.mixed.total()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BatchHistogram):
            return NotImplemented
        return self.decode == other.decode and self.mixed == other.mixed

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"BatchHistogram({self._num_batches} batches, {len(self.decode)} + {len(self.mixed)} sizes)"


def _parse(data: str | bytes) -> Any:
    if len(data) > MAX_JSON_BYTES:
        raise HistogramError(f"a batch histogram of {len(data)} bytes is longer than any that was written")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HistogramError(f"a batch histogram is not readable as JSON: {error}") from error


def _canonical(document: object) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _checksum(counts: object) -> str:
    return hashlib.sha256(_canonical(counts).encode()).hexdigest()


def _to_json(counts: collections.Counter[int]) -> dict[str, int]:
    return {str(size): count for size, count in sorted(dict(counts).items()) if count > 0}


def _from_json(counts: Any) -> collections.Counter[int]:
    if not isinstance(counts, dict):
        raise HistogramError("the batch histogram has no counts")
    result: collections.Counter[int] = collections.Counter()
    for size, count in counts.items():
        if not _is_size(size) or type(count) is not int or not 1 <= count <= MAX_BATCHES:
            raise HistogramError(f"the batch histogram has an impossible count {count!r:.40} for size {size!r:.40}")
        result[int(size)] = count
    return result


def _is_size(text: str) -> bool:
    """Whether a key is a size as :func:`_to_json` writes it."""
    is_number = len(text) <= len(str(MAX_SIZE)) and text.isascii() and text.isdigit() and not text.startswith("0")
    return is_number and int(text) <= MAX_SIZE
