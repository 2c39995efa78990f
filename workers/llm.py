"""The offline front: ``LLM(model=...).generate(prompts, SamplingParams(...))``, in the shape vLLM's users know.

A script written for vLLM's ``LLM`` runs by swapping the import. Everything happens in the caller's process and
thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.progress import Progress

from workers.config import EngineConfig
from workers.engine.heap import frozen_heap
from workers.engine.start import start_engine
from workers.errors import InvalidRequestError
from workers.outputs import CompletionOutput, PositionLogprobs, RequestOutput, TokenChunk
from workers.sampling_params import SamplingParams
from workers.tokenizer.tokenizer import Tokenizer

#: A prompt as text, as ``{"prompt": text}`` or as ``{"prompt_token_ids": [...]}``.
Prompt = str | Mapping[str, Any]


@dataclasses.dataclass(slots=True)
class _Collected:
    """One completion under way."""

    prompt_index: int
    index: int
    output: CompletionOutput
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int | None = None

    def extend(self, chunk: TokenChunk) -> None:
        output = self.output
        output.token_ids.extend(chunk.token_ids)
        output.text += chunk.text
        if chunk.logprobs is not None:
            output.logprobs = (output.logprobs or []) + chunk.logprobs
            gained = sum(next(iter(position.values())).logprob for position in chunk.logprobs)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + gained
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs = chunk.prompt_logprobs
        if chunk.num_cached_tokens is not None:
            self.num_cached_tokens = chunk.num_cached_tokens
        if chunk.finish_reason is not None:
            output.finish_reason, output.stop_reason = chunk.finish_reason.value, chunk.stop_reason


@contextlib.contextmanager
def _progress(total: int, is_shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar, if wanted; yields what moves it on by one completion."""
    if not is_shown:
        yield lambda: None
        return
    with Progress() as progress:
        task = progress.add_task("completions", total=total)
        yield lambda: progress.advance(task)


class LLM:
    """A model ready to generate.

    Args:
        model: Checkpoint folder, name of an imported model, or Hugging Face repo id.
        options: Any other field of :class:`EngineConfig`, by name.

    Raises:
        ConfigError: An option is unknown or wrong; says what to change.
        ModelError: The model cannot be found or is not supported.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.engine = start_engine(EngineConfig.create(model=model, **options))
        self._ids = itertools.count()
        # While steps run, these are saved now and then; at the end comes what is left.
        weakref.finalize(self, self.engine.save_traffic)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InvalidRequestError: The engine runs with ``skip_tokenizer_init``.
        """
        if self.engine.tokenizer is None:
            raise InvalidRequestError("This LLM has no tokenizer; create it without skip_tokenizer_init.")
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt.

        Args:
            prompts: One prompt or many.
            sampling_params: One for all, or one per prompt; None samples with the defaults.
            use_tqdm: Show a progress bar (vLLM's name for it).

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            InvalidRequestError: A prompt or its parameters cannot be served; then none is.
        """
        prompt_list = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        params = self._spread(sampling_params, len(prompt_list))
        token_ids = [self._token_ids(prompt) for prompt in prompt_list]
        collected: dict[str, _Collected] = {}
        with frozen_heap(), _progress(sum(single.n for single in params), use_tqdm) as advance:
            for chunk in self._run(token_ids, params, collected):
                collected[chunk.request_id].extend(chunk)
                if chunk.finish_reason is not None:
                    advance()
        return self._outputs(prompt_list, token_ids, list(collected.values()))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many, through the model's chat template; see :meth:`generate`."""
        is_single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_single else messages
        tokenizer = self.get_tokenizer()
        prompts: list[Prompt] = []
        for conversation in conversations:
            turns = [dict(turn) for turn in conversation]
            text = tokenizer.render_chat(turns, add_generation_prompt=add_generation_prompt)
            prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _spread(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * count
        if len(params) != count:
            raise InvalidRequestError(
                f"Give one SamplingParams, or one per prompt: got {len(params)} for {count} prompts.",
                param="sampling_params",
            )
        return params

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.get_tokenizer().encode(prompt)
        if "prompt_token_ids" in prompt:
            return list(prompt["prompt_token_ids"])
        if "prompt" in prompt:
            return self.get_tokenizer().encode(prompt["prompt"])
        raise InvalidRequestError(
            f"A prompt is a string, or has 'prompt' or 'prompt_token_ids'; got the keys {sorted(prompt)}.",
            param="prompts",
        )

    def _run(
        self, token_ids: list[list[int]], params: Sequence[SamplingParams], collected: dict[str, _Collected]
    ) -> Iterator[TokenChunk]:
        """Queue every completion, enter it into ``collected``, and step until all are done."""
        try:
            additions = self._add(token_ids, params, collected)
            num_tokens = 0
            for added in additions:
                num_tokens += added
                if num_tokens >= self.engine.config.max_num_batched_tokens:
                    break
            # The device computes a full step while the others are queued.
            chunks = self.engine.step()
            deque(additions, maxlen=0)
            yield from chunks
            while self.engine.has_unfinished:
                yield from self.engine.step()
        except BaseException:
            self.engine.abort(collected)
            raise

    def _add(
        self, token_ids: list[list[int]], params: Sequence[SamplingParams], collected: dict[str, _Collected]
    ) -> Iterator[int]:
        """Queue the completions one by one; yields the length of each one's prompt."""
        for prompt_index, (ids, wanted) in enumerate(zip(token_ids, params, strict=True)):
            for index, single in enumerate(wanted.fan_out()):
                request_id = str(next(self._ids))
                self.engine.add_request(request_id, ids, single)
                empty = CompletionOutput(index, "", [], None, None)
                collected[request_id] = _Collected(prompt_index, index, empty)
                yield len(ids)

    def _outputs(
        self, prompts: Sequence[Prompt], token_ids: list[list[int]], collected: list[_Collected]
    ) -> list[RequestOutput]:
        parts_of_prompt: list[list[_Collected]] = [[] for _ in prompts]
        for item in collected:
            parts_of_prompt[item.prompt_index].append(item)
        outputs = []
        for prompt_index, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True)):
            parts = parts_of_prompt[prompt_index]
            outputs.append(
                RequestOutput(
                    request_id=str(prompt_index),
                    prompt=prompt if isinstance(prompt, str) else prompt.get("prompt"),
                    prompt_token_ids=ids,
                    prompt_logprobs=parts[0].prompt_logprobs,
                    outputs=[item.output for item in parts],
                    finished=True,
                    num_cached_tokens=parts[0].num_cached_tokens,
                )
            )
        return outputs
