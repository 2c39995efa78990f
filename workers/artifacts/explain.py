"""Why there is no bundle for a key: the factors that differ from the nearest one there is.

Pure functions over factors; which bundles exist is the library's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from workers.artifacts.key import BundleKey, differing_factors

#: Factors that a metric's label names; more of them are counted.
_MAX_NAMES = 4

#: Factors of which a label only says that something in them differs.
_GROUPED = frozenset({"sources", "inductor", "passes", "model"})


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """One factor with two values; None where it is missing."""

    name: str
    wanted: Any
    stored: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """A key against the nearest bundle.

    Attributes:
        key: That was looked for.
        nearest: Key of the nearest bundle; None if the store has none.
        graph: Factors that keep that bundle from being used; empty if it is the one that was looked for.
        capture: Differences that only change what is captured.
        runtime: Differences that change neither.
    """

    key: str
    nearest: str | None = None
    graph: tuple[Difference, ...] = ()
    capture: tuple[Difference, ...] = ()
    runtime: tuple[Difference, ...] = ()

    @property
    def label(self) -> str:
        """The factors that differ, short enough for a metric's label."""
        if self.nearest is None:
            return "no_bundle"
        if not self.graph:
            return "same_key"
        names = sorted({_group(difference.name) for difference in self.graph})
        more = f",+{len(names) - _MAX_NAMES}" if len(names) > _MAX_NAMES else ""
        return ",".join(names[:_MAX_NAMES]) + more

    def sentence(self) -> str:
        """For a log line."""
        if self.nearest is None:
            return "the store has no bundle at all"
        if not self.graph:
            return f"no factor differs from bundle {self.nearest[:16]}"
        parts = [f"{item.name} is {item.wanted!r}, there {item.stored!r}" for item in self.graph[:_MAX_NAMES]]
        more = f" and {len(self.graph) - _MAX_NAMES} more" if len(self.graph) > _MAX_NAMES else ""
        return f"the nearest bundle {self.nearest[:16]} differs in {len(self.graph)}: {'; '.join(parts)}{more}"


def explain(key: BundleKey, candidates: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Explanation:
    """Compare with the candidate that differs least.

    Args:
        candidates: The factors' sections of every bundle, by key.
    """
    if not candidates:
        return Explanation(key.digest)

    def distance(digest: str) -> tuple[int, str]:
        return len(differing_factors(key.graph, candidates[digest]["graph"])), digest

    nearest = min(candidates, key=distance)
    sections = candidates[nearest]
    return Explanation(
        key.digest,
        nearest,
        _differences(key.graph, sections["graph"]),
        _differences(key.capture, sections["capture"]),
        _differences(key.runtime, sections["runtime"]),
    )


def _differences(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[Difference, ...]:
    return tuple(Difference(*item) for item in differing_factors(wanted, stored))


def _group(name: str) -> str:
    """A label has few values: that some source file changed, not which."""
    head, _, rest = name.partition(".")
    return head if head in _GROUPED or not rest else name
