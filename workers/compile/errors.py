"""What can go wrong between a model and its compiled form."""

from __future__ import annotations

from workers.errors import WarmgraphError


class CompileError(WarmgraphError):
    """Base of the compile layer's errors."""


class GraphBreakError(CompileError):
    """The model does not trace into one graph; the message names the line that broke it."""


class RecompileError(CompileError):
    """A call after start would have compiled again; the message names the function and the guards that failed."""


class PlanMismatchError(CompileError):
    """A plan does not belong to this model, these weights or this environment; the message says what differs."""


class BuildFailedError(CompileError):
    """The compiler failed, now or recently, or what it built was wrong; the model runs without compilation."""


class SelfCheckError(CompileError):
    """Loaded code crashed, hung, or computed something else than it should; it is not used.

    Attributes:
        blobs: Digests of the builds that did so; empty if any of them may have.
    """

    def __init__(self, message: str, blobs: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.blobs = blobs


class UnlinkablePieceError(CompileError):
    """A built library would not load safely on other hosts and is refused; the message says why."""
