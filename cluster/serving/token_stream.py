"""The chunks of one attempt of a request on their way from a replica's step messages to whoever reads them.

They are pushed: a reader is called from the loop that takes in the step message, since to wake a task for every token
costs more than all that is done with the token. Knows nothing about where chunks come from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.api.client import ChunkSink
from workers.outputs import TokenChunk


class TokenStream:
    """The chunks of one attempt. They wait here until somebody reads, since the replica's reply may come after them."""

    __slots__ = ("_early", "_ended", "_error", "_is_over", "_sink")

    def __init__(self) -> None:
        self._early: list[TokenChunk] = []
        self._sink: ChunkSink | None = None
        self._ended: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._is_over = False

    def put(self, chunks: Sequence[TokenChunk]) -> None:
        """Hand on what a message brought; an error of the reader ends the stream, and is raised where it reads."""
        if self._is_over:
            return
        if self._sink is None:
            self._early.extend(chunks)
            return
        try:
            self._sink(chunks)
        except Exception as error:  # noqa: BLE001  # raised again by read()
            self.fail(error)
        else:
            if chunks[-1].finish_reason is not None:
                self._end()

    def fail(self, error: Exception) -> None:
        """End the stream: the reader gets what is there, then the error."""
        if not self._is_over:
            self._error = error
            self._end()

    async def read(self, sink: ChunkSink) -> None:
        """Hand every chunk to ``sink``, until the last one.

        Raises:
            Exception: What :meth:`fail` was given, or what ``sink`` raised.
        """
        early, self._early = self._early, []
        if early:
            sink(early)
            if early[-1].finish_reason is not None:
                return
        if not self._is_over:
            self._sink = sink
            self._ended = asyncio.get_running_loop().create_future()
            try:
                await self._ended
            finally:
                self._is_over = True
        if self._error is not None:
            raise self._error

    def _end(self) -> None:
        self._is_over = True
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
