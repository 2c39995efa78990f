"""The front door: who sent a request, whether they may, and until when they wait for it.

Puts keys, limits and deadlines together for the HTTP layer, which hands in two header values and gets a
:class:`Caller`. The place in the queue is the waiting room's business.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from cluster.admission.deadline import request_timeout_s
from cluster.admission.keys import ApiKey, KeyRing
from cluster.admission.limits import KeyLimits
from cluster.admission.rate import Clock


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """The sender of one admitted request.

    Attributes:
        name: Under which it waits; "" where no keys are configured, so that all share one queue.
        weight: Its share under saturation.
        time_left_s: Seconds until its deadline, at the time of the call; None if it has none.
        take_tokens: Charges its limit; raises RateLimitError if that is used up.
        give_back_tokens: Returns what was charged and not used.
    """

    name: str = ""
    weight: float = 1.0
    time_left_s: Callable[[], float | None] = lambda: None
    take_tokens: Callable[[int], None] = lambda num_tokens: None
    give_back_tokens: Callable[[int], None] = lambda num_tokens: None


class Admission:
    """Judges requests as they arrive at one ingress.

    Args:
        keys: Who is let in; None lets everybody in, without limits.
        default_timeout_s: Deadline of requests that name none.
        max_timeout_s: Longest deadline.
        num_ingresses: Ingress processes that share the limits.
        clock: Where time comes from.
    """

    def __init__(
        self,
        keys: KeyRing | None = None,
        default_timeout_s: float | None = None,
        max_timeout_s: float | None = None,
        num_ingresses: int = 1,
        clock: Clock = time.monotonic,
    ) -> None:
        self._keys = keys
        self._limits = KeyLimits(clock, num_ingresses)
        self._default_timeout_s = default_timeout_s
        self._max_timeout_s = max_timeout_s
        self._clock = clock

    def authenticate(self, authorization: str | None) -> ApiKey | None:
        """The caller's key; None where no keys are configured.

        Raises:
            AuthenticationError: Keys are configured, and this is none of them.
        """
        return None if self._keys is None else self._keys.authenticate(authorization)

    def admit(self, authorization: str | None, timeout: str | None) -> Caller:
        """Let a generation request in.

        Args:
            authorization: The header of that name.
            timeout: The header ``X-Request-Timeout``.

        Raises:
            AuthenticationError: As :meth:`authenticate`.
            RateLimitError: The key's requests are used up.
            InvalidRequestError: The time-out is not a number.
        """
        arrived_s = self._clock()
        key = self.authenticate(authorization)
        timeout_s = request_timeout_s(timeout, self._default_timeout_s, self._max_timeout_s)

        def time_left_s() -> float | None:
            return None if timeout_s is None else arrived_s + timeout_s - self._clock()

        if key is None:
            return Caller(time_left_s=time_left_s)
        self._limits.take_request(key)
        return Caller(
            key.name,
            key.weight,
            time_left_s,
            lambda num_tokens: self._limits.take_tokens(key, num_tokens),
            lambda num_tokens: self._limits.give_back(key, num_tokens),
        )
