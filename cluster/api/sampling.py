"""From a validated request to SamplingParams: limits against the context and the vocabulary.

Knows no HTTP; ranges of the parameters themselves are SamplingParams' to check.
"""

from __future__ import annotations

from collections.abc import Collection

from cluster.api.client import ModelClient
from cluster.api.protocol import GenerationRequest
from workers.errors import InvalidRequestError, PromptTooLongError
from workers.sampling_params import MAX_LOGPROBS, SamplingParams


def resolve_max_tokens(
    num_prompt_tokens: int,
    max_model_len: int,
    requested: int | None,
    *,
    param: str,
    prompt_param: str = "prompt",
    default: int | None = None,
) -> int:
    """Most tokens to generate. An explicit number that does not fit is an error; the default shrinks to fit.

    Args:
        num_prompt_tokens: Length of the prompt.
        max_model_len: The model's context, prompt and output together.
        requested: What the request says, or None.
        param: Name of the parameter that said it.
        prompt_param: Name of the parameter that holds the prompt.
        default: Used if the request says nothing; None means what is left of the context.

    Raises:
        PromptTooLongError: The prompt alone, or together with ``requested``, exceeds the context.
    """
    left = max_model_len - num_prompt_tokens
    if left < 1:
        raise PromptTooLongError(
            f"The prompt has {num_prompt_tokens} tokens, but the model's context is {max_model_len} tokens, prompt and "
            f"output together; shorten the prompt to at most {max_model_len - 1} tokens.",
            param=prompt_param,
        )
    if requested is None:
        return left if default is None else min(default, left)
    if requested < 1:
        raise InvalidRequestError(f"{param} must be at least 1, got {requested}.", param=param)
    if requested > left:
        raise PromptTooLongError(
            f"The prompt has {num_prompt_tokens} tokens and {param} is {requested}, but the model's context is "
            f"{max_model_len} tokens; ask for at most {left} tokens or shorten the prompt.",
            param=param,
        )
    return requested


def sampling_params(
    request: GenerationRequest,
    client: ModelClient,
    max_tokens: int,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The request's sampling parameters, ``n`` included.

    Raises:
        InvalidRequestError: A value is out of range, or a token id out of the vocabulary.
    """
    check_token_ids(request.logit_bias or (), client.vocab_size, "logit_bias")
    check_token_ids(request.stop_token_ids or (), client.vocab_size, "stop_token_ids")
    if request.stop and client.tokenizer is None:
        raise InvalidRequestError(
            f"{client.name} is served without a tokenizer, so stop strings cannot match; use stop_token_ids.",
            param="stop",
        )
    return SamplingParams(
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias or None,
        seed=request.seed,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        detokenize=client.tokenizer is not None,
        skip_special_tokens=request.skip_special_tokens,
    )


def check_token_ids(token_ids: Collection[int], vocab_size: int, param: str) -> None:
    """Refuse token ids that the model does not have."""
    if not token_ids:
        return
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{param} has the token id {token_id}, but the model's ids go from 0 to {vocab_size - 1}.", param=param
            )


def check_top_logprobs(value: int | None, param: str) -> None:
    """Refuse more alternatives per token than the engine reports."""
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise InvalidRequestError(f"{param} must be between 0 and {MAX_LOGPROBS}, got {value}.", param=param)
