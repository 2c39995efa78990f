"""What each key has asked for lately, against what it may ask for per minute.

Limits are kept by each ingress on its own: with several of them every one grants its share, so that together they
grant the limit when requests are spread evenly, and never more.
"""

from __future__ import annotations

import dataclasses
import math

from cluster.admission.errors import RateLimitError
from cluster.admission.keys import ApiKey
from cluster.admission.rate import Clock
from cluster.admission.token_bucket import TokenBucket


@dataclasses.dataclass(frozen=True, slots=True)
class _Buckets:
    requests: TokenBucket | None
    tokens: TokenBucket | None


class KeyLimits:
    """The buckets of every key.

    Args:
        clock: Where time comes from.
        num_ingresses: Ingress processes among which every limit is divided.
    """

    def __init__(self, clock: Clock, num_ingresses: int = 1) -> None:
        self._clock = clock
        self._share = 1.0 / num_ingresses
        self._buckets: dict[str, _Buckets] = {}

    def take_request(self, key: ApiKey) -> None:
        """Count one HTTP request.

        Raises:
            RateLimitError: The key's requests of this minute are used up.
        """
        self._take(self._of(key).requests, 1.0, key, "requests")

    def take_tokens(self, key: ApiKey, num_tokens: int) -> None:
        """Count a request's prompt and the most that it may generate, until :meth:`give_back` says what it did not.

        Raises:
            RateLimitError: The key's tokens of this minute are used up.
        """
        self._take(self._of(key).tokens, num_tokens, key, "tokens")

    def give_back(self, key: ApiKey, num_tokens: int) -> None:
        """Return tokens that a request had counted and did not use."""
        bucket = self._of(key).tokens
        if bucket is not None:
            bucket.spend(-num_tokens)

    def _of(self, key: ApiKey) -> _Buckets:
        buckets = self._buckets.get(key.name)
        if buckets is None:
            buckets = self._buckets[key.name] = _Buckets(
                self._bucket(key.requests_per_minute), self._bucket(key.tokens_per_minute)
            )
        return buckets

    def _bucket(self, per_minute: float | None) -> TokenBucket | None:
        return None if per_minute is None else TokenBucket(per_minute * self._share, self._clock)

    def _take(self, bucket: TokenBucket | None, amount: float, key: ApiKey, what: str) -> None:
        if bucket is None:
            return
        wait_s = bucket.wait_s(amount)
        if wait_s > 0:
            limit = key.requests_per_minute if what == "requests" else key.tokens_per_minute
            raise RateLimitError(
                f"The key {key.name!r} may use {limit:g} {what} per minute, now used up; wait {math.ceil(wait_s)} s.",
                wait_s,
            )
        bucket.spend(amount)
