"""The chunks of one request on their way from a replica's step messages to the task that reads them.

A reader that falls behind gets several chunks as one; what waits is bounded by the request's ``max_tokens``, and kept
as one chunk, not as one per token. Knows nothing about where chunks come from.
"""

from __future__ import annotations

import asyncio

from workers.outputs import TokenChunk, join_chunks

#: Unread chunks that are put together.
_MAX_UNREAD = 64


class TokenStream:
    """The chunks of one attempt, waiting for their reader."""

    __slots__ = ("_chunks", "_error", "_reader")

    def __init__(self) -> None:
        self._chunks: list[TokenChunk] = []
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, chunk: TokenChunk) -> None:
        """Add what a step brought."""
        self._chunks.append(chunk)
        if len(self._chunks) > _MAX_UNREAD:
            self._chunks = [join_chunks(self._chunks)]
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream: the reader gets what is there, then the error."""
        self._error = error
        self._wake()

    async def get(self) -> TokenChunk:
        """What arrived since the last call; waits for at least one chunk, raises what :meth:`fail` was given."""
        if not self._chunks:
            if self._error is None:
                self._reader = asyncio.get_running_loop().create_future()
                await self._reader
            if not self._chunks:
                assert self._error is not None
                raise self._error
        chunks, self._chunks = self._chunks, []
        return chunks[0] if len(chunks) == 1 else join_chunks(chunks)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
