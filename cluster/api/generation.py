"""All completions of one HTTP request, generated in parallel and merged into one stream of chunks.

Counts tokens, feeds the metrics, and turns a completion that failed or was cut off into an error. Knows nothing
about JSON or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from cluster.admission.admission import Caller
from cluster.admission.deadline import TIMEOUT_HEADER
from cluster.admission.errors import DeadlineExceededError
from cluster.api.client import ModelClient
from cluster.api.errors import GenerationFailedError
from cluster.api.metrics import ModelMetrics
from cluster.api.responses import PromptTokensDetails, Usage
from cluster.messages import GenerateRequest
from workers.errors import EngineDeadError, QueueFullError, UserError
from workers.outputs import FinishReason, TokenChunk, join_chunks

#: A choice's index and what it got.
_Chunk = tuple[int, TokenChunk]
#: The same on its way; None when it ended; an error when it failed.
_Item = tuple[int, TokenChunk | Exception | None]


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

    async def chunks(self) -> AsyncGenerator[tuple[int, TokenChunk], None]:
        """Every choice's chunks with its index, as they come. Closing it aborts what is still generated.

        Raises:
            QueueFullError, EngineDeadError, UserError: From the model; the other choices are aborted.
            GenerationFailedError: The engine gave up on a choice.
            RateLimitError: The caller's tokens are used up.
            DeadlineExceededError: The caller's deadline has passed; every choice is aborted.
        """
        num_charged = sum(len(r.prompt_token_ids) + (r.params.max_tokens or 0) for r in self.requests)
        self._caller.take_tokens(num_charged)
        has_deadline = self._caller.time_left_s() is not None
        try:
            async with aclosing(_merge(self._client, self.requests)) as merged:
                async for index, chunk in self._until_deadline(merged) if has_deadline else merged:
                    if self._discard_output:
                        _discard_output(chunk)
                    self._account(index, chunk)
                    yield index, chunk
            if self._unfinished:
                raise EngineDeadError("The stream of tokens ended before the completion was finished; try again.")
        except (GeneratorExit, asyncio.CancelledError, DeadlineExceededError):
            self._metrics.finished["abort"].inc(len(self._unfinished))
            raise
        except (QueueFullError, UserError):
            raise  # refused, not failed: the HTTP status counts it
        except Exception:
            self._metrics.finished["error"].inc(len(self._unfinished))
            raise
        finally:
            self._caller.give_back_tokens(num_charged - self._num_read_tokens - self._num_generated_tokens)

    async def collect(self) -> list[TokenChunk]:
        """Every choice as one chunk. Raises what :meth:`chunks` raises."""
        parts: list[list[TokenChunk]] = [[] for _ in self.requests]
        async with aclosing(self.chunks()) as chunks:
            async for index, chunk in chunks:
                parts[index].append(chunk)
        return [join_chunks(chunks_of_choice) for chunks_of_choice in parts]

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_generated_tokens,
            total_tokens=self._num_prompt_tokens + self._num_generated_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached_tokens),
        )

    async def _until_deadline(self, chunks: AsyncGenerator[_Chunk, None]) -> AsyncGenerator[_Chunk, None]:
        """The chunks; raises if the caller's time is over while the next one is waited for."""
        while True:
            try:
                async with asyncio.timeout(self._caller.time_left_s()):
                    item = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeadlineExceededError(
                    f"The request's deadline has passed after {self._num_generated_tokens} tokens; ask for fewer, or "
                    f"allow more time with {TIMEOUT_HEADER}."
                ) from None
            yield item

    def _account(self, index: int, chunk: TokenChunk) -> None:
        num_tokens = len(chunk.token_ids)
        if num_tokens:
            now, last = time.perf_counter(), self._last_token_s[index]
            if last is None:
                self._metrics.time_to_first_token.observe(now - self._started_s)
            else:
                self._metrics.tokens.note_gap(now - last)
            self._last_token_s[index] = now
            self._metrics.tokens.num_tokens += num_tokens
            self._num_generated_tokens += num_tokens
        if chunk.num_cached_tokens is not None:  # a choice's first chunk
            self._num_read_tokens += len(self.requests[index].prompt_token_ids)
        if chunk.num_cached_tokens is not None and index % self._n == 0:  # a prompt's first chunk
            self._num_cached_tokens += chunk.num_cached_tokens
            self._metrics.prompt_tokens.inc(len(self.requests[index].prompt_token_ids))
        if chunk.finish_reason is not None:
            self._finish(index, chunk)

    def _finish(self, index: int, chunk: TokenChunk) -> None:
        if chunk.finish_reason is FinishReason.ERROR:
            raise GenerationFailedError(chunk.error or "The engine failed on this request.")
        if chunk.finish_reason is FinishReason.ABORT:
            raise GenerationFailedError(chunk.error or "The server aborted the request; try again.")
        assert chunk.finish_reason is not None
        self._unfinished.discard(index)
        self._metrics.finished[chunk.finish_reason.value].inc()
        self._metrics.e2e_latency.observe(time.perf_counter() - self._started_s)


def _discard_output(chunk: TokenChunk) -> None:
    chunk.token_ids, chunk.text, chunk.logprobs, chunk.stop_reason = [], "", None, None
    if chunk.finish_reason is FinishReason.STOP:
        chunk.finish_reason = FinishReason.LENGTH


async def _merge(
    client: ModelClient, requests: Sequence[GenerateRequest]
) -> AsyncGenerator[tuple[int, TokenChunk], None]:
    """Chunks of all requests, each with its request's position."""
    if len(requests) == 1:
        async with aclosing(client.stream(requests[0])) as stream:
            async for chunk in stream:
                yield 0, chunk
        return
    queue: asyncio.Queue[_Item] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(client, index, request, queue)) for index, request in enumerate(requests)]
    try:
        num_open = len(pumps)
        while num_open:
            index, item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(client: ModelClient, index: int, request: GenerateRequest, queue: asyncio.Queue[_Item]) -> None:
    """Move one stream into the queue. The queue is bounded by ``max_tokens`` alone."""
    try:
        async with aclosing(client.stream(request)) as stream:
            async for chunk in stream:
                queue.put_nowait((index, chunk))
    except Exception as error:  # noqa: BLE001  # raised again by the reader of the queue
        queue.put_nowait((index, error))
    else:
        queue.put_nowait((index, None))
