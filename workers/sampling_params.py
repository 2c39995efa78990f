"""How one request wants its tokens chosen and when it wants to stop.

Field names and defaults are those of vLLM's ``SamplingParams``. Knows nothing about tensors or tokenizers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from workers.errors import InvalidRequestError

#: Most alternatives per position that ``logprobs`` and ``prompt_logprobs`` may ask for.
MAX_LOGPROBS = 20
#: Most stop strings, and stop token ids, in one request.
MAX_STOPS = 64

_SEED_RANGE = 2**63


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        n: Number of completions for the prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: Keep the smallest set of tokens whose probability mass reaches this; in (0, 1].
        top_k: Keep this many most likely tokens; 0 or -1 keeps all.
        min_p: Drop tokens less likely than ``min_p`` times the most likely one; in [0, 1].
        repetition_penalty: Divides (positive) or multiplies (negative) the logits of tokens seen in prompt or
            output, as in CTRL (Keskar et al., 2019); > 0.
        presence_penalty: Subtracted once from the logits of tokens seen in the output; in [-2, 2].
        frequency_penalty: Subtracted per occurrence in the output; in [-2, 2].
        logit_bias: Token id to additive bias, or None.
        seed: Makes the request's tokens independent of whatever else is in the batch and repeatable.
        stop: Stop strings; the text is cut before the first match.
        stop_token_ids: Token ids that end the completion.
        include_stop_str_in_output: Keep the matched stop string in the text.
        ignore_eos: Do not stop at the model's end-of-sequence tokens.
        max_tokens: Most tokens to generate; None means up to the model's context.
        min_tokens: EOS and stop tokens cannot be sampled before this many tokens.
        logprobs: Number of most likely alternatives to report per output token (0 reports the chosen token
            only), or None for no logprobs.
        prompt_logprobs: The same for prompt tokens.
        detokenize: Produce text; False returns token ids only (then ``stop`` must be empty).
        skip_special_tokens: Leave special tokens out of the text.

    Raises:
        InvalidRequestError: A value is of the wrong type or out of range; names the parameter.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: Sequence[str] | str | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    # Normalised views, filled by __post_init__.
    stop_strings: tuple[str, ...] = dataclasses.field(init=False, default=(), repr=False)
    stop_ids: frozenset[int] = dataclasses.field(init=False, default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, 128)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -_SEED_RANGE, _SEED_RANGE - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).", param="min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._normalise_stops()
        if self.logit_bias is not None:
            for token_id, bias in self.logit_bias.items():
                _check_int("logit_bias", token_id, 0, 2**31 - 1)
                _check_float("logit_bias", bias, -100.0, 100.0)

    def _normalise_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if any(not isinstance(s, str) or not s for s in stop):
            raise InvalidRequestError("stop must hold non-empty strings only.", param="stop")
        if stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True; use stop_token_ids instead.", param="stop")
        ids = tuple(self.stop_token_ids or ())
        for token_id in ids:
            _check_int("stop_token_ids", token_id, 0, 2**31 - 1)
        for name, values in (("stop", stop), ("stop_token_ids", ids)):
            if len(values) > MAX_STOPS:
                raise InvalidRequestError(f"{name} may hold at most {MAX_STOPS} entries, got {len(values)}.", param=name)
        object.__setattr__(self, "stop_strings", stop)
        object.__setattr__(self, "stop_ids", frozenset(ids))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken at every step."""
        return self.temperature == 0.0

    @property
    def needs_penalties(self) -> bool:
        """Whether the sampler needs the request's prompt and output token counts."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def fan_out(self) -> list[SamplingParams]:
        """One set of parameters per completion: ``n`` copies with ``n=1``, the i-th seeded with ``seed + i``."""
        if self.n == 1:
            return [self]
        seeds = [None if self.seed is None else _wrap_seed(self.seed + i) for i in range(self.n)]
        return [dataclasses.replace(self, n=1, seed=seed) for seed in seeds]


def _wrap_seed(seed: int) -> int:
    return (seed + _SEED_RANGE) % (2 * _SEED_RANGE) - _SEED_RANGE


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer, got {value!r}.", param=name)
    if not low <= value <= high:
        raise InvalidRequestError(f"{name} must be between {low} and {high}, got {value}.", param=name)


def _check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a finite number, got {value!r}.", param=name)
    if value > high or value < low or (open_low and value == low):
        bound = "greater than" if open_low else "at least"
        raise InvalidRequestError(f"{name} must be {bound} {low} and at most {high}, got {value}.", param=name)
