"""All completions of one HTTP request, generated in parallel, their chunks handed on as they come.

Counts tokens, feeds the metrics, and turns a completion that failed or was cut off into an error. Knows nothing
about JSON or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from cluster.admission.admission import Caller
from cluster.admission.deadline import TIMEOUT_HEADER
from cluster.admission.errors import DeadlineExceededError
from cluster.api.client import ChunkSink, ModelClient
from cluster.api.errors import GenerationFailedError
from cluster.api.metrics import ModelMetrics
from cluster.api.responses import PromptTokensDetails, Usage
from cluster.messages import GenerateRequest
from workers.errors import EngineDeadError, QueueFullError, UserError
from workers.outputs import FinishReason, TokenChunk, join_chunks

#: Receives a choice's index and what it got: one chunk, or several that came together.
ChoiceSink = Callable[[int, Sequence[TokenChunk]], None]


class Generation:
    """The completions of one HTTP request. Choice ``i`` completes prompt ``i // n``.

    Args:
        client: The model.
        requests: One per choice.
        n: Choices per prompt.
        metrics: The model's metrics.
        started_s: ``time.perf_counter()`` at the arrival of the HTTP request.
        caller: Whose limit pays for it, and until when it is wanted.
        discard_output: Only the prompts are of interest: what is generated is neither counted nor handed out.
    """

    def __init__(
        self,
        client: ModelClient,
        requests: Sequence[GenerateRequest],
        n: int,
        metrics: ModelMetrics,
        started_s: float,
        caller: Caller,
        *,
        discard_output: bool = False,
    ) -> None:
        self.requests = requests
        self._client = client
        self._n = n
        self._metrics = metrics
        self._started_s = started_s
        self._caller = caller
        self._discard_output = discard_output
        self._last_token_s: list[float | None] = [None] * len(requests)
        self._unfinished = set(range(len(requests)))
        self._num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests[::n])
        self._num_generated_tokens = 0
        self._num_cached_tokens = 0
        self._num_read_tokens = 0
        self._is_unread = False  # the reader failed, say because its client has gone

    async def run(self, on_chunks: ChoiceSink) -> None:
        """Generate all choices; ``on_chunks`` gets every chunk with its choice's index. Cancelling aborts them.

        Raises:
            QueueFullError, EngineDeadError, UserError: From the model; the other choices are aborted.
            GenerationFailedError: The engine gave up on a choice.
            RateLimitError: The caller's tokens are used up.
            DeadlineExceededError: The caller's deadline has passed; every choice is aborted.
        """
        num_charged = sum(len(r.prompt_token_ids) + (r.params.max_tokens or 0) for r in self.requests)
        self._caller.take_tokens(num_charged)
        try:
            await self._run_until_deadline(on_chunks)
            if self._unfinished:
                raise EngineDeadError("The stream of tokens ended before the completion was finished; try again.")
        except (asyncio.CancelledError, DeadlineExceededError):
            self._metrics.finished["abort"].inc(len(self._unfinished))
            raise
        except (QueueFullError, UserError):
            raise  # refused, not failed: the HTTP status counts it
        except Exception:
            self._metrics.finished["abort" if self._is_unread else "error"].inc(len(self._unfinished))
            raise
        finally:
            self._caller.give_back_tokens(num_charged - self._num_read_tokens - self._num_generated_tokens)

    async def collect(self) -> list[TokenChunk]:
        """Every choice as one chunk. Raises what :meth:`run` raises."""
        parts: list[list[TokenChunk]] = [[] for _ in self.requests]
        await self.run(lambda index, chunks: parts[index].extend(chunks))
        return [join_chunks(chunks_of_choice) for chunks_of_choice in parts]

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_generated_tokens,
            total_tokens=self._num_prompt_tokens + self._num_generated_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached_tokens),
        )

    async def _run_until_deadline(self, on_chunks: ChoiceSink) -> None:
        try:
            async with asyncio.timeout(self._caller.time_left_s()) as deadline:
                await self._run_all([self._sink(index, on_chunks) for index in range(len(self.requests))])
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeadlineExceededError(
                f"The request's deadline has passed after {self._num_generated_tokens} tokens; ask for fewer, or "
                f"allow more time with {TIMEOUT_HEADER}."
            ) from None

    async def _run_all(self, sinks: list[ChunkSink]) -> None:
        if len(sinks) == 1:
            await self._client.generate(self.requests[0], sinks[0])
            return
        choices = [
            asyncio.create_task(self._client.generate(request, sink))
            for request, sink in zip(self.requests, sinks, strict=True)
        ]
        try:
            await asyncio.gather(*choices)
        finally:
            for choice in choices:
                choice.cancel()
            await asyncio.gather(*choices, return_exceptions=True)

    def _sink(self, index: int, on_chunks: ChoiceSink) -> ChunkSink:
        """Where a choice's chunks go."""

        def receive(chunks: Sequence[TokenChunk]) -> None:
            failure = _failure(chunks[-1])
            if failure is not None:
                chunks = chunks[:-1]
            if self._discard_output:
                _discard_output(chunks)
            if chunks:
                self._account(index, chunks)
                try:
                    on_chunks(index, chunks)
                except Exception:
                    self._is_unread = True
                    raise
            if failure is not None:
                raise failure

        return receive

    def _account(self, index: int, chunks: Sequence[TokenChunk]) -> None:
        num_tokens = len(chunks[0].token_ids) if len(chunks) == 1 else sum(len(chunk.token_ids) for chunk in chunks)
        if num_tokens:
            now, last = time.perf_counter(), self._last_token_s[index]
            if last is None:
                self._metrics.time_to_first_token.observe(now - self._started_s)
            else:
                self._metrics.tokens.note_gap(now - last)
            self._last_token_s[index] = now
            self._metrics.tokens.num_tokens += num_tokens
            self._num_generated_tokens += num_tokens
        num_cached_tokens = chunks[0].num_cached_tokens
        if num_cached_tokens is not None:  # a choice's first chunk
            num_prompt_tokens = len(self.requests[index].prompt_token_ids)
            self._num_read_tokens += num_prompt_tokens
            if index % self._n == 0:  # a prompt's first choice
                self._num_cached_tokens += num_cached_tokens
                self._metrics.prompt_tokens.inc(num_prompt_tokens)
        finish_reason = chunks[-1].finish_reason
        if finish_reason is not None:
            self._unfinished.discard(index)
            self._metrics.finished[finish_reason.value].inc()
            self._metrics.e2e_latency.observe(time.perf_counter() - self._started_s)


def _failure(chunk: TokenChunk) -> GenerationFailedError | None:
    """Why a choice failed, if this is the chunk that tells."""
    if chunk.finish_reason is FinishReason.ERROR:
        return GenerationFailedError(chunk.error or "The engine failed on this request.")
    if chunk.finish_reason is FinishReason.ABORT:
        return GenerationFailedError(chunk.error or "The server aborted the request; try again.")
    return None


def _discard_output(chunks: Sequence[TokenChunk]) -> None:
    for chunk in chunks:
        chunk.token_ids, chunk.text, chunk.logprobs, chunk.stop_reason = [], "", None, None
        if chunk.finish_reason is FinishReason.STOP:
            chunk.finish_reason = FinishReason.LENGTH
