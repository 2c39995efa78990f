"""What a load test sends: prompts and lengths, drawn from a seed, so that two servers get the same requests.

Knows no HTTP and no clock.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from workers.errors import ConfigError

#: Common English words that most vocabularies hold as one token with the space before them.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend"
)
_WORDS = tuple(_TEXT.split())
#: Ids below this are often special tokens.
_FIRST_ID = 100


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """A fixed length, or a range to draw from evenly; in tokens."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """``128`` or ``64:256``.

        Raises:
            ConfigError: It is neither.
        """
        low, _, high = text.partition(":")
        if not low.isdigit() or (high and not high.isdigit()) or not 1 <= int(low) <= int(high or low):
            raise ConfigError(f"{option} takes a length like 128 or a range like 64:256, got {text!r}.", param=option)
        return cls(int(low), int(high or low))

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.low, self.high)


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request.

    Attributes:
        prompt: Text, or token ids.
        max_tokens: Length of the answer.
        gap_s: Seconds between the request before and this one; 0 where the load is not a rate.
    """

    prompt: str | list[int]
    max_tokens: int
    gap_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """A seeded stream of requests.

    Attributes:
        prompt_tokens: Length of prompts; of text it is the number of words, which is about the number of tokens.
        output_tokens: Length of answers.
        shared_share: Share of the requests that begin with one of the common prefixes; in [0, 1].
        num_prefixes: How many common prefixes there are.
        prefix_share: Part of such a request's prompt that is the common prefix; in [0, 1].
        rate: Requests per second, arriving as a Poisson process; None sends as fast as the concurrency allows.
        vocab_size: Send random token ids below this instead of text; None sends text.
        seed: Of everything that is drawn.
    """

    prompt_tokens: Lengths
    output_tokens: Lengths
    shared_share: float = 0.0
    num_prefixes: int = 8
    prefix_share: float = 0.5
    rate: float | None = None
    vocab_size: int | None = None
    seed: int = 0

    def requests(self, num: int) -> Iterator[PlannedRequest]:
        """The first ``num`` requests; the same ones every time."""
        rng = random.Random(self.seed)
        prefixes = [self._tokens(rng, self.prompt_tokens.high) for _ in range(self.num_prefixes)]
        for _ in range(num):
            length = self.prompt_tokens.draw(rng)
            tokens = self._tokens(rng, length)
            if rng.random() < self.shared_share:
                num_shared = round(length * self.prefix_share)
                tokens[:num_shared] = rng.choice(prefixes)[:num_shared]
            gap_s = rng.expovariate(self.rate) if self.rate else 0.0
            yield PlannedRequest(self._prompt(tokens), self.output_tokens.draw(rng), gap_s)

    def _tokens(self, rng: random.Random, length: int) -> list[int]:
        if self.vocab_size is None:
            return rng.choices(range(len(_WORDS)), k=length)
        return rng.choices(range(min(_FIRST_ID, self.vocab_size - 1), self.vocab_size), k=length)

    def _prompt(self, tokens: list[int]) -> str | list[int]:
        return tokens if self.vocab_size is not None else " ".join(_WORDS[token] for token in tokens)
