"""How long a request may take, as its client or the operator says."""

from __future__ import annotations

import math

from workers.errors import InvalidRequestError

#: Name of the header in which a client says how many seconds it will wait.
TIMEOUT_HEADER = "X-Request-Timeout"


def request_timeout_s(header: str | None, default_s: float | None, max_s: float | None) -> float | None:
    """Seconds from the request's arrival to its deadline; None if it has none.

    Args:
        header: Value of ``X-Request-Timeout``, in seconds, or None.
        default_s: The operator's word for requests that do not say.
        max_s: The operator's word for those that do, or do not: nobody gets more.

    Raises:
        InvalidRequestError: The header is not a positive number.
    """
    limits = [limit for limit in (_parse(header) if header is not None else default_s, max_s) if limit is not None]
    return min(limits, default=None)


def _parse(header: str) -> float:
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not (0 < seconds < math.inf):
        raise InvalidRequestError(
            f"{TIMEOUT_HEADER} must be a positive number of seconds, got {header[:32]!r}.", param=TIMEOUT_HEADER
        )
    return seconds
