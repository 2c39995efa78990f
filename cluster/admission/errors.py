"""The errors of admission; ``cluster/api/errors.py`` gives them their HTTP status."""

from __future__ import annotations

from workers.errors import QueueFullError, UserError, WarmgraphError


class AuthenticationError(UserError):
    """No API key, or one that is not known (HTTP 401)."""


class RateLimitError(QueueFullError):
    """A key has used up what it may ask for per minute (HTTP 429)."""


class DeadlineExceededError(WarmgraphError):
    """The request's own deadline has passed (HTTP 504)."""
