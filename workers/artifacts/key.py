"""The key of a bundle: every factor that its compiled code depends on, and a digest of them.

Factors are named one by one, in three sections; what is not named is in no section. Only the first decides what a
bundle can be used for. The other two are kept beside it in clear, so that a difference can be explained. Knows factors
as JSON data; who collects them is in workers.compile.key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from workers.artifacts.digest import canonical_json, sha256

#: Raise it when the meaning of the factors changes.
KEY_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class BundleKey:
    """Factors by name; values are JSON data and may be nested.

    Attributes:
        graph: What compiled code depends on. Its digest is the key.
        capture: What only changes which graphs are captured, and how much memory they take.
        runtime: What changes neither.
    """

    graph: Mapping[str, Any]
    capture: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    runtime: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        # As they come back from a manifest: tuples are lists there.
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, json.loads(canonical_json(getattr(self, field.name))))

    @functools.cached_property
    def digest(self) -> str:
        """64 hexadecimal digits."""
        return graph_digest(self.graph)

    @functools.cached_property
    def capture_digest(self) -> str:
        """A digest of the key and what captures depend on."""
        return sha256(canonical_json([KEY_FORMAT, self.graph, self.capture]))


def graph_digest(graph: Mapping[str, Any]) -> str:
    """The key that belongs to these graph-affecting factors."""
    return sha256(canonical_json({"format": KEY_FORMAT, "graph": graph}))


def differing_factors(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Every factor that differs, by its dotted name, with both values; a missing one has the value None."""
    left, right = dict(_flat(one)), dict(_flat(other))
    names = sorted(left.keys() | right.keys())
    return [(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]


def _flat(factors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in factors.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
