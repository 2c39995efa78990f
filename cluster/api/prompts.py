"""From the text of a request to token ids: chat rendering, tokenisation, checks.

Work on long texts runs on a small pool of threads, so that a long prompt does not stop the streams of others
(the tokenizer must release the interpreter lock for that to help). Knows no sampling and no HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.api.client import ModelClient, Tokenizer
from cluster.api.protocol import ChatCompletionRequest, CompletionRequest
from cluster.api.sampling import check_token_ids
from cluster.api.settings import ApiSettings
from workers.errors import InvalidRequestError

ResultT = TypeVar("ResultT")

#: Decoding a token costs about as much as encoding its characters.
_CHARS_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt ready for the engine.

    Attributes:
        token_ids: The prompt.
        text: Its text, as given or, for an echo, decoded; "" if nobody needs it.
    """

    token_ids: list[int]
    text: str


class PromptReader:
    """Reads prompts, on the event loop if they are short and on its own threads if not."""

    def __init__(self, settings: ApiSettings) -> None:
        self._inline_chars = settings.inline_tokenization_chars
        self._threads = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenize")

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def read_completion(self, request: CompletionRequest, client: ModelClient) -> list[TokenizedPrompt]:
        """The prompts of a completion request, in order.

        Raises:
            InvalidRequestError: A prompt has no tokens, a token id is not the model's, or text is given to or
                asked from a model without a tokenizer.
        """
        prompts = _split_prompts(request.prompt)
        size = sum(len(p) if isinstance(p, str) else _CHARS_PER_TOKEN * len(p) * request.echo for p in prompts)
        read = await self._run(size, lambda: [_read_prompt(prompt, request, client) for prompt in prompts])
        for prompt in read:
            _refuse_empty(prompt.token_ids, "prompt")
        return read

    async def read_chat(self, request: ChatCompletionRequest, client: ModelClient) -> TokenizedPrompt:
        """The conversation of a chat request as one prompt.

        Raises:
            UserError: The model has no tokenizer or no chat template, or the template refuses the conversation.
        """
        tokenizer = _require_tokenizer(client, "messages")
        messages = [message.to_template() for message in request.messages]
        size = sum(len(message.content or "") for message in request.messages)

        def read() -> TokenizedPrompt:
            text = tokenizer.render_chat(
                messages,
                add_generation_prompt=request.add_generation_prompt,
                **(request.chat_template_kwargs or {}),
            )
            return TokenizedPrompt(tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens)), text)

        prompt = await self._run(size, read)
        _refuse_empty(prompt.token_ids, "messages")
        return prompt

    async def _run(self, num_chars: int, function: Callable[[], ResultT]) -> ResultT:
        if num_chars <= self._inline_chars:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)


def _split_prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]  # a list that starts with an id holds ids only
    return prompt  # type: ignore[return-value]  # a list of strings, or of lists of ids


def _read_prompt(prompt: str | list[int], request: CompletionRequest, client: ModelClient) -> TokenizedPrompt:
    if isinstance(prompt, str):
        tokenizer = _require_tokenizer(client, "prompt")
        add_special_tokens = request.add_special_tokens is not False
        return TokenizedPrompt(tokenizer.encode(prompt, add_special_tokens=add_special_tokens), prompt)
    check_token_ids(prompt, client.vocab_size, "prompt")
    text = _require_tokenizer(client, "echo").decode(prompt, skip_special_tokens=False) if request.echo else ""
    return TokenizedPrompt(prompt, text)


def _require_tokenizer(client: ModelClient, param: str) -> Tokenizer:
    if client.tokenizer is None:
        raise InvalidRequestError(
            f"{client.name} is served without a tokenizer; send prompt to /v1/completions as a list of token ids, "
            "without echo.",
            param=param,
        )
    return client.tokenizer


def _refuse_empty(token_ids: list[int], param: str) -> None:
    if not token_ids:
        raise InvalidRequestError(f"{param} has no tokens; it must not be empty.", param=param)
