"""Runs fusion passes in order and counts what they matched.

Knows passes as names, digests and functions; what one of them does is in its own file.
"""

from __future__ import annotations

import abc
import hashlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import fx

from workers.compile.errors import CompileError

logger = logging.getLogger(__name__)


class GraphPass(abc.ABC):
    """One rewrite of the full graph, before it is split."""

    name: ClassVar[str]

    @abc.abstractmethod
    def run(self, graph: fx.Graph) -> int:
        """Rewrite ``graph`` in place; returns the number of matches."""

    def constants(self) -> dict[str, Any]:
        """Whatever besides its source decides what the pass does."""
        return {}

    def uuid(self) -> str:
        """A digest over the source of the pass's module and its constants: part of every key of compiled code."""
        text = inspect.getsource(inspect.getmodule(type(self)) or type(self)) + repr(sorted(self.constants().items()))
        return hashlib.sha256(text.encode()).hexdigest()


class PassManager:
    """An ordered list of passes.

    Args:
        passes: In the order in which they run.
        switches: Passes by name that are turned on or off; the others are on.

    Raises:
        CompileError: A switch names no pass.
    """

    def __init__(self, passes: Sequence[GraphPass], switches: Mapping[str, bool] | None = None) -> None:
        known = [graph_pass.name for graph_pass in passes]
        assert len(set(known)) == len(known), "two passes of one name"
        switches = dict(switches or {})
        unknown = sorted(switches.keys() - set(known))
        if unknown:
            raise CompileError(
                f"pass_config: there is no pass {', '.join(unknown)}; the passes are {', '.join(known)}."
            )
        self._passes = [graph_pass for graph_pass in passes if switches.get(graph_pass.name, True)]

    def run(self, graph: fx.Graph) -> dict[str, int]:
        """Run every pass; returns the matches of each by name, in order."""
        matches = {}
        for graph_pass in self._passes:
            matches[graph_pass.name] = graph_pass.run(graph)
            graph.lint()
        logger.info("passes: %s", ", ".join(f"{name}: {count} matches" for name, count in matches.items()) or "none")
        return matches

    def uuids(self) -> dict[str, str]:
        """Digest of every pass that runs, by name, in order."""
        return {graph_pass.name: graph_pass.uuid() for graph_pass in self._passes}
