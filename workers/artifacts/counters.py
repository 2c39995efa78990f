"""What the artifact layer has done in this process, as numbers."""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import Self


@dataclasses.dataclass(slots=True)
class ArtifactCounters:
    """Of one library.

    Attributes:
        lookups: By outcome; asking again counts only when the answer changed.
        refusals: Manifests, blobs and bundles that were not used, by reason.
        misses: By the factors that differ from the nearest bundle.
        store_failures: Calls that failed, by ``reading`` or ``writing``.
        num_build_failures: Builds that failed and were remembered.
        num_eager_starts: Models that run eagerly because of a failed build, here or elsewhere.
        num_fetched: Blobs read.
        bytes_fetched: Their size.
        num_published: Manifests written.
        bytes_published: Blobs written with them.
        seconds_saved: Recorded build seconds of the bundles that were found.
    """

    lookups: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refusals: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    misses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    store_failures: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    num_build_failures: int = 0
    num_eager_starts: int = 0
    num_fetched: int = 0
    bytes_fetched: int = 0
    num_published: int = 0
    bytes_published: int = 0
    seconds_saved: float = 0.0

    def snapshot(self) -> Self:
        """A copy that stays as it is."""
        return copy.deepcopy(self)
