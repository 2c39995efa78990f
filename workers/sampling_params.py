"""How one request wants its tokens chosen and when it wants to stop.

Field names, defaults and special values are those of vLLM's ``SamplingParams``, except that ``n > 1`` is allowed
with greedy sampling and gives equal completions. Knows nothing about tensors or tokenizers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workers.errors import InvalidRequestError

#: Most alternatives per position that ``logprobs`` and ``prompt_logprobs`` may ask for.
MAX_LOGPROBS = 20
#: Most stop strings, and stop token ids, in one request.
MAX_STOPS = 64
#: Most entries of ``logit_bias`` in one request.
MAX_LOGIT_BIAS = 1024
#: Temperatures below this count as 0, that is, greedy (vLLM's ``_SAMPLING_EPS``).
GREEDY_TEMPERATURE = 1e-5

_SEED_RANGE = 2**63
#: vLLM's spelling of "no seed".
_NO_SEED = -1


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        n: Number of completions for the prompt.
        temperature: Logits are divided by it; 0 (or less than ``GREEDY_TEMPERATURE``) is greedy, and then
            ``top_p``, ``top_k`` and ``min_p`` have nothing to do.
        top_p: Keep the smallest set of tokens whose probability mass reaches this; in (0, 1].
        top_k: Keep this many most likely tokens, and those as likely as the last of them; 0 or -1 keeps all.
        min_p: Drop tokens less likely than ``min_p`` times the most likely one; in [0, 1].
        repetition_penalty: Divides (positive) or multiplies (negative) the logits of tokens seen in prompt or
            output, as in CTRL (Keskar et al., 2019); > 0.
        presence_penalty: Subtracted once from the logits of tokens seen in the output; in [-2, 2].
        frequency_penalty: Subtracted per occurrence in the output; in [-2, 2].
        logit_bias: Token id to additive bias, or None.
        seed: Makes the request's tokens repeatable, whatever else is in the batch; None or -1 for no seed.
        stop: Stop strings; the text is cut before the first match.
        stop_token_ids: Token ids that end the completion.
        include_stop_str_in_output: Keep the matched stop string in the text.
        ignore_eos: Do not stop at the model's end-of-sequence tokens.
        max_tokens: Most tokens to generate; None means up to the model's context.
        min_tokens: EOS and stop tokens cannot be sampled before this many tokens.
        logprobs: Number of most likely alternatives to report per output token (0 reports the chosen token
            only, True is 1), or None for no logprobs.
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
            if self.seed == _NO_SEED:
                object.__setattr__(self, "seed", None)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).",
                param="min_tokens",
            )
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false, got {getattr(self, name)!r}.", param=name)
        self._check_logprobs()
        self._normalise_stops()
        self._check_logit_bias()

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                object.__setattr__(self, name, 1)
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequestError(
                f"logit_bias must map token ids to numbers, got {self.logit_bias!r}.", param="logit_bias"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"logit_bias may hold at most {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}.",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, 2**31 - 1)
            _check_float("logit_bias", bias, -100.0, 100.0)

    def _normalise_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        if any(not isinstance(s, str) or not s for s in stop):
            raise InvalidRequestError("stop must hold non-empty strings only.", param="stop")
        if stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True; use stop_token_ids instead.", param="stop")
        ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        for token_id in ids:
            _check_int("stop_token_ids", token_id, 0, 2**31 - 1)
        for name, values in (("stop", stop), ("stop_token_ids", ids)):
            if len(values) > MAX_STOPS:
                raise InvalidRequestError(
                    f"{name} may hold at most {MAX_STOPS} entries, got {len(values)}.", param=name
                )
        object.__setattr__(self, "stop_strings", stop)
        object.__setattr__(self, "stop_ids", frozenset(ids))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken at every step."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def needs_penalties(self) -> bool:
        """Whether the sampler needs the request's prompt and output token counts."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Args:
            vocab_size: Rows of the model's output layer.

        Raises:
            InvalidRequestError: ``logit_bias`` or ``stop_token_ids`` names an id of ``vocab_size`` or more.
        """
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_ids)):
            if ids and (largest := max(ids)) >= vocab_size:
                raise InvalidRequestError(
                    f"{name} holds token id {largest}, but this model's vocabulary ends at {vocab_size - 1}.",
                    param=name,
                )

    def fan_out(self) -> list[SamplingParams]:
        """``n`` copies with ``n=1``, one per completion, the i-th seeded with ``seed + i``."""
        if self.n == 1:
            return [self]
        seeds = [None if self.seed is None else _offset_seed(self.seed, i) for i in range(self.n)]
        return [dataclasses.replace(self, n=1, seed=seed) for seed in seeds]


def _offset_seed(seed: int, offset: int) -> int:
    """``seed + offset``, wrapped to 64 bits; -1, which would mean no seed, becomes one far from the rest."""
    moved = (seed + offset + _SEED_RANGE) % (2 * _SEED_RANGE) - _SEED_RANGE
    return moved if moved != _NO_SEED else seed ^ (1 << 62)


def _as_tuple(name: str, values: object) -> tuple[Any, ...]:
    if values is None:
        return ()
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise InvalidRequestError(f"{name} must be a list, got {values!r}.", param=name)
    return tuple(values)


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
