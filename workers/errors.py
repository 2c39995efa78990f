"""The error tree, drawn once.

Every error that a user can cause is a :class:`UserError` whose message is one sentence that says what to
change; ``param`` names the offending field where there is one. The HTTP layer maps this tree to status codes
in one place (``cluster/api/errors.py``). Broken invariants of our own are assertions, not members of this tree.
"""

from __future__ import annotations


class WarmgraphError(Exception):
    """Base of every error that warmgraph raises on purpose."""


class UserError(WarmgraphError, ValueError):
    """The caller asked for something that cannot be done; the message says what to change.

    Attributes:
        param: Name of the request parameter or config key at fault, or None.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling by default; these cross processes.
        return (_rebuild_user_error, (type(self), str(self), self.param))


def _rebuild_user_error(cls: type[UserError], message: str, param: str | None) -> UserError:
    return cls(message, param=param)


class ConfigError(UserError):
    """A config file or a constructor argument is wrong."""


class ModelError(UserError):
    """A model cannot be found, read, or is of an architecture that is not supported."""


class InvalidRequestError(UserError):
    """A request's parameters are wrong or unsupported (HTTP 400)."""


class PromptTooLongError(InvalidRequestError):
    """The prompt does not fit the model's context (HTTP 400, code ``context_length_exceeded``)."""


class UnknownModelError(UserError):
    """The request names a model that is not served here (HTTP 404)."""


class QueueFullError(WarmgraphError):
    """The bounded request queue is full (HTTP 429).

    Attributes:
        retry_after_s: Seconds after which a retry is likely to be accepted.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self), self.retry_after_s))


class EngineDeadError(WarmgraphError):
    """The engine stopped because of an unexpected error; its replica must be replaced (HTTP 503)."""


class DeviceLostError(WarmgraphError):
    """Work on the device failed in a way that the process cannot come back from."""


class PoisonedRequestError(WarmgraphError):
    """Replicas die of the request, so it is not tried again (HTTP 500, not to be retried)."""
