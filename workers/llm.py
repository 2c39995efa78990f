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
from workers.outputs import CompletionOutput, RequestOutput, TokenChunk
from workers.sampling_params import SamplingParams
from workers.tokenizer.tokenizer import Tokenizer

#: A prompt as text, as ``{"prompt": text}`` or as ``{"prompt_token_ids": [...]}``.
Prompt = str | Mapping[str, Any]


@dataclasses.dataclass(slots=True)
class _Collected:
    """One completion under way, and the output that it is a part of."""

    whole: RequestOutput
    part: CompletionOutput

    def extend(self, chunk: TokenChunk) -> None:
        whole, part = self.whole, self.part
        part.token_ids.extend(chunk.token_ids)
        part.text += chunk.text
        if chunk.logprobs is not None:
            part.logprobs = (part.logprobs or []) + chunk.logprobs
            gained = sum(next(iter(position.values())).logprob for position in chunk.logprobs)
            part.cumulative_logprob = (part.cumulative_logprob or 0.0) + gained
        if chunk.prompt_logprobs is not None and part.index == 0:
            whole.prompt_logprobs = chunk.prompt_logprobs
        if chunk.num_cached_tokens is not None and part.index == 0:
            whole.num_cached_tokens = chunk.num_cached_tokens
        if chunk.finish_reason is not None:
            part.finish_reason, part.stop_reason = chunk.finish_reason.value, chunk.stop_reason


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
        # Batch sizes are saved now and then while steps run; this saves what is left.
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
        outputs: list[RequestOutput] = []
        collected: dict[str, _Collected] = {}
        with frozen_heap(), _progress(sum(single.n for single in params), use_tqdm) as advance:
            for chunk in self._run(self._add(prompt_list, params, outputs, collected), collected):
                collected[chunk.request_id].extend(chunk)
                if chunk.finish_reason is not None:
                    advance()
        return outputs

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

    def _run(self, additions: Iterator[int], collected: Mapping[str, _Collected]) -> Iterator[TokenChunk]:
        """Step until all that is added is done."""
        config, num_tokens = self.engine.config, 0
        try:
            for num_added in additions:
                num_tokens += num_added
                if num_tokens >= config.max_num_batched_tokens or len(collected) >= config.max_num_seqs:
                    break
            # The device computes a full step while the others are tokenised and queued.
            chunks = self.engine.step()
            deque(additions, maxlen=0)
            yield from chunks
            while self.engine.has_unfinished:
                yield from self.engine.step()
        except BaseException:
            self.engine.abort(collected)
            raise

    def _add(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        outputs: list[RequestOutput],
        collected: dict[str, _Collected],
    ) -> Iterator[int]:
        """Queue every completion, and give it a place in the outputs; yields the length of each one's prompt."""
        for prompt_index, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            ids = self._token_ids(prompt)
            text = prompt if isinstance(prompt, str) else prompt.get("prompt")
            whole = RequestOutput(str(prompt_index), text, ids, None, [], finished=True)
            outputs.append(whole)
            for index, single in enumerate(wanted.fan_out()):
                request_id = str(next(self._ids))
                self.engine.add_request(request_id, ids, single)
                part = CompletionOutput(index, "", [], None, None)
                whole.outputs.append(part)
                collected[request_id] = _Collected(whole, part)
                yield len(ids)
