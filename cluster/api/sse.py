"""Server-sent events: the response that sends them, and the constant part of every chunk, written once.

A chunk of the hot path is three strings joined and one string escaped: no pydantic, no ``json.dumps``. Escaping is
to ASCII, because some clients split lines at every Unicode line separator. Knows nothing about endpoints.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from cluster.api.eager import start_eagerly
from cluster.api.errors import to_api_error
from cluster.api.generation import Generation
from cluster.api.middleware import Exchange
from cluster.api.responses import Usage
from workers.outputs import TokenChunk, join_chunks

_DONE = b"data: [DONE]\n\n"
#: Chunks held for a client that is behind, per choice, before they are put together: what is held is bounded by
#: ``max_tokens``, and is one chunk, not one per token.
_MAX_HELD = 64


class ChunkEnvelope:
    """Writes the events of one stream.

    Args:
        head: Fields that every chunk has (id, object, created, model, ...), in order.
        include_usage: Whether chunks carry ``"usage": null`` and a last one the usage, as the OpenAI API has it.
    """

    def __init__(self, head: dict[str, Any], *, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._open = f'data: {_dump(head)[:-1]},"choices":['
        self._close = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def text_frame(self, choice: dict[str, Any], hole: str) -> tuple[str, str]:
        """What stands before and after the only part of a choice that changes, marked there by ``hole``."""
        before, after = _dump(choice).split(_dump(hole))
        return self._open + before, after + self._close

    def choice(self, choice: dict[str, Any]) -> str:
        """A whole event with one choice."""
        return self._open + _dump(choice) + self._close

    def usage(self, usage: Usage) -> bytes:
        """The event that ends a stream if usage was asked for, else nothing."""
        if not self._include_usage:
            return b""
        return f'{self._open}],"usage":{usage.model_dump_json()}}}\n\n'.encode()


def fill(frame: tuple[str, str], text: str) -> bytes:
    """One event of the hot path: ``text`` as a JSON string in its frame."""
    return (frame[0] + encode_basestring_ascii(text) + frame[1]).encode("ascii")


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


class ChunkEncoder(Protocol):
    """Writes the chunks of one endpoint's stream."""

    envelope: ChunkEnvelope

    def encode(self, index: int, chunk: TokenChunk) -> bytes:
        """The events that tell the client of ``chunk``; b"" if there is nothing to tell yet."""
        ...


class EventStreamResponse(Response):
    """Sends the events of a generation as they come, then ``[DONE]``.

    An error before the first event leaves the response unstarted, so that it becomes an HTTP status; a later one
    ends the stream with an error event and no ``[DONE]``. A client that leaves is the middleware's to notice.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, encoder: ChunkEncoder) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        writer = _EventWriter(start, send, Exchange.of(scope), self._encoder)
        try:
            try:
                await self._generation.run(writer.put)
            except ClientDisconnect:
                raise
            except Exception as error:
                if not writer.has_begun:
                    raise
                last = f"data: {_dump(to_api_error(error).body())}\n\n".encode()  # the status is sent
            else:
                last = self._encoder.envelope.usage(self._generation.usage()) + _DONE
            await writer.close(last)
        finally:
            writer.abandon()


class _EventWriter:
    """Sends events without waiting for the client: what comes while it is behind is held and put together.

    Args:
        start: The message that begins the response, sent before the first event.
        send: What sends the beginning and the end.
        exchange: What sends events between them.
        encoder: Makes the events.

    Attributes:
        has_begun: The response's status is sent, or about to be.
    """

    def __init__(self, start: Message, send: Send, exchange: Exchange, encoder: ChunkEncoder) -> None:
        self.has_begun = False
        self._start = start
        self._send = send
        self._push = exchange.push
        self._encode = encoder.encode
        self._sending: asyncio.Task[None] | None = None
        self._held: dict[int, list[TokenChunk]] = {}

    def put(self, index: int, chunks: Sequence[TokenChunk]) -> None:
        """Send the events of a choice's chunks in one piece, or hold them while the client has not taken those before.

        Raises:
            ClientDisconnect: The connection is broken.
        """
        if self._sending is not None:
            if not self._sending.done():
                self._hold(index, chunks)
                return
            self._sending.result()
            self._sending = None
        if len(chunks) == 1:
            events = self._encode(index, chunks[0])
        else:
            events = b"".join([self._encode(index, chunk) for chunk in chunks])
        if not events:
            return
        sending = self._push(events) if self.has_begun else start_eagerly(self._begin(events))
        if sending is not None:
            self._sending = asyncio.get_running_loop().create_task(self._catch_up(sending))

    async def close(self, last: bytes) -> None:
        """Send what is held, then ``last``, and end the response."""
        if self._sending is not None:
            await self._sending
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    def abandon(self) -> None:
        """Stop sending, if something still waits for the client."""
        if self._sending is not None:
            self._sending.cancel()

    async def _begin(self, events: bytes) -> None:
        self.has_begun = True
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def _catch_up(self, sending: asyncio.Task[None] | None) -> None:
        """Wait for the client, then send what was held meanwhile, until nothing is."""
        while True:
            if sending is not None:
                await sending
            if not self._held:
                return
            held, self._held = self._held, {}
            events = b"".join([self._encode(index, join_chunks(part)) for index, part in held.items()])
            sending = self._push(events) if events else None

    def _hold(self, index: int, chunks: Sequence[TokenChunk]) -> None:
        held = self._held.setdefault(index, [])
        held.extend(chunks)
        if len(held) > _MAX_HELD:
            self._held[index] = [join_chunks(held)]
