"""The chunks of one request on their way from a replica's step messages to the task that reads them.

A reader that falls behind gets several chunks at once; what waits is bounded by the request's ``max_tokens``. Knows
nothing about where chunks come from.
"""

from __future__ import annotations

import asyncio

from workers.outputs import TokenChunk


class TokenStream:
    """The chunks of one attempt, waiting for their reader."""

    __slots__ = ("_changed", "_chunks", "_error")

    def __init__(self) -> None:
        self._chunks: list[TokenChunk] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, chunk: TokenChunk) -> None:
        """Add what a step brought."""
        self._chunks.append(chunk)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """End the stream: the reader gets what is there, then the error."""
        self._error = error
        self._changed.set()

    async def get(self) -> list[TokenChunk]:
        """All chunks that arrived since the last call; waits for at least one, raises what :meth:`fail` was given."""
        await self._changed.wait()
        if self._chunks:
            chunks, self._chunks = self._chunks, []
            if self._error is None:
                self._changed.clear()
            return chunks
        assert self._error is not None
        raise self._error
