"""The pieces of one key as a library holds them: found, read, judged complete. Needs no model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from workers.artifacts.errors import Refusal, RefusedError, StoreError
from workers.artifacts.key import BundleKey
from workers.artifacts.library import ArtifactLibrary, Lookup, Outcome
from workers.compile.errors import BuildFailedError, PlanMismatchError
from workers.compile.piece_set import PieceSet, read_plan
from workers.compile.plan import Plan

logger = logging.getLogger(__name__)


class StoredPieces:
    """See the module.

    Args:
        formats: Piece formats that may be loaded, the best one first.
        sizes: Batch sizes that must be there; None stands for all of them.

    Attributes:
        lookup: The library's last answer; None before it was asked.
    """

    def __init__(
        self, library: ArtifactLibrary, key: BundleKey, formats: Sequence[str], sizes: Sequence[int | None]
    ) -> None:
        self.lookup: Lookup | None = None
        self._library = library
        self._key = key
        self._formats = formats
        self._sizes = sizes

    def find(self) -> PieceSet | None:
        """The pieces, if the library has all that a replica loads. Trouble with the store counts as a miss.

        Raises:
            BuildFailedError: What was built for this key was wrong twice, and nobody builds it again.
        """
        plan, lookup = self.read()
        if lookup.outcome is Outcome.BLOCKED:
            raise BuildFailedError(
                f"What was built for key {self._key.digest[:16]} was wrong twice; see `warmgraph artifacts quarantine`."
            )
        if plan is None:
            return None
        for name in self._formats:
            if all(name in plan.formats(size) for size in self._sizes):
                return PieceSet(plan, name, self._library, lookup.bundle, is_warm=True)
        return None

    def read(self) -> tuple[Plan | None, Lookup]:
        """The plan with all its builds, if there is one, and the answer that it came with."""
        self.lookup = lookup = self._library.open(self._key)
        if lookup.bundle is None:
            return None, lookup
        try:
            return read_plan(self._library, lookup.bundle), lookup
        except PlanMismatchError as error:
            self._library.quarantine(lookup.bundle, Refusal.STRUCTURE, str(error))
        except (RefusedError, StoreError) as error:
            logger.warning("the plan of key %s is not used: %s", self._key.digest[:16], error)
        return None, lookup
