"""Server-sent events: the response that sends them, and the constant part of every chunk, written once.

A chunk of the hot path is three strings joined and one string escaped: no pydantic, no ``json.dumps``. Escaping is
to ASCII, because some clients split lines at every Unicode line separator. Knows nothing about endpoints.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from json.encoder import encode_basestring_ascii
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.api.errors import to_api_error
from cluster.api.generation import Generation
from cluster.api.responses import Usage
from workers.outputs import TokenChunk

_DONE = b"data: [DONE]\n\n"


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


async def generation_events(generation: Generation, encoder: ChunkEncoder) -> AsyncGenerator[bytes, None]:
    """The events of a generation. Closing it aborts the generation."""
    async with aclosing(generation.chunks()) as chunks:
        async for index, chunk in chunks:
            events = encoder.encode(index, chunk)
            if events:
                yield events
    usage = encoder.envelope.usage(generation.usage())
    if usage:
        yield usage


class EventStreamResponse(Response):
    """Sends events as they come, then ``[DONE]``.

    An error before the first event leaves the response unstarted, so that it becomes an HTTP status; a later one
    ends the stream with an error event and no ``[DONE]``. A client that leaves is the middleware's to notice.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            body = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while True:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                try:
                    body = await anext(events)
                except StopAsyncIteration:
                    last = _DONE
                    break
                except Exception as error:  # noqa: BLE001  # the status is sent: the stream itself must tell
                    last = f"data: {_dump(to_api_error(error).body())}\n\n".encode()
                    break
            await send({"type": "http.response.body", "body": last, "more_body": False})
