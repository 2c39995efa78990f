"""Why an artifact is not used: the errors of the artifact layer, and their reasons as names for labels and marks."""

from __future__ import annotations

import enum

from workers.errors import WarmgraphError


class Refusal(enum.StrEnum):
    """Why something in a store is refused; the value is a metric's label and stands in quarantine marks."""

    MALFORMED = "malformed"
    """Not what the format says, of another version, or with a name that could lead elsewhere."""
    OTHER_VERSION = "other_version"
    """Written by code that this code does not understand; nothing is wrong with it."""
    TOO_LARGE = "too_large"
    """Beyond the configured limits, or beyond what its manifest says."""
    UNSIGNED = "unsigned"
    """No signature at all."""
    UNKNOWN_SIGNER = "unknown_signer"
    """Signed, but by no key that is trusted here (any more)."""
    BAD_SIGNATURE = "bad_signature"
    """Names a trusted key, whose signature it is not."""
    WRONG_KEY = "wrong_key"
    """A valid manifest of another key, or under a name that is not its digest."""
    MISSING_BLOB = "missing_blob"
    """A blob that the manifest names is not in the store."""
    DAMAGED_BLOB = "damaged_blob"
    """A blob whose bytes are not what the manifest says."""
    STRUCTURE = "structure"
    """Parameter names, shapes or dtypes of the live model differ from what was compiled for."""
    SELF_CHECK = "self_check"
    """The loaded code crashed, hung, or computed something else than it should."""
    QUARANTINED = "quarantined"
    """Marked bad before, here or elsewhere in the fleet."""


class ArtifactError(WarmgraphError):
    """Base of the artifact layer's errors."""


class StoreError(ArtifactError):
    """A store cannot be reached, is too slow, full or read-only. Nothing in it is to blame."""


class RefusedError(ArtifactError):
    """Bytes from a store are not used; nothing of them was executed.

    Attributes:
        reason: The kind of trouble.
    """

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.reason, str(self)))
