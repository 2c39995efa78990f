"""What happens around every request: its id, its metrics, a client that leaves, an error that nobody expected.

Plain ASGI, because a wrapper that re-sends every chunk through a queue would cost more than the chunk. A stream of
small parts goes past the layers inside this one, which look at the start and the end of a response only.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api.eager import start_eagerly
from cluster.api.errors import to_api_error
from cluster.api.metrics import HttpMetrics
from workers.errors import InvalidRequestError

logger = logging.getLogger(__name__)

#: Status under which a request whose client left is counted (nginx's convention); nobody receives it.
CLIENT_CLOSED_REQUEST = 499

#: Methods that metrics name; a client could send any word.
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
#: Where a scope keeps its exchange.
_SCOPE_KEY = "warmgraph.exchange"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestMiddleware:
    """Wraps the whole application.

    - ``X-Request-Id`` of the request, or a new one, goes back with the response.
    - A client that disconnects cancels the task that answers it, whatever it is waiting for; generators below are
      closed by that, which aborts their requests.
    - A client that takes nothing for too long, while something waits to be sent, is treated as one that left.
    - An unexpected error before the response has started becomes a 500 with an opaque id.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, stalled_client_s: float) -> None:
        self._app = app
        self._metrics = metrics
        self._stalled_client_s = stalled_client_s
        self._open: set[Exchange] = set()
        self._sweeper: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._metrics.in_flight.inc()
        exchange = scope[_SCOPE_KEY] = Exchange(receive, send, _header(scope, b"x-request-id"))
        self._open.add(exchange)
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
        try:
            await exchange.run(self._app, scope)
        finally:
            self._open.discard(exchange)
            self._metrics.in_flight.dec()
            endpoint = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(method, endpoint, exchange.status).inc()

    async def _sweep(self) -> None:
        """Give up stalled clients. One task for all, because a timer for every chunk would cost more than the chunk."""
        while self._open:
            await asyncio.sleep(self._stalled_client_s / 4)
            limit = time.monotonic() - self._stalled_client_s
            for exchange in [*self._open]:
                if exchange.sending_since_s is not None and exchange.sending_since_s < limit:
                    logger.warning("a client has taken nothing for %.0f s; giving it up", self._stalled_client_s)
                    exchange.give_up()
        self._sweeper = None


class Exchange:
    """One request and its response; an endpoint finds it with :meth:`of`.

    Attributes:
        status: Of the response; 499 if the client left before it was complete.
        sending_since_s: Since when a part of the response waits to be taken (``time.monotonic()``), or None.
    """

    def __init__(self, receive: Receive, send: Send, request_id: str | None) -> None:
        self.status = CLIENT_CLOSED_REQUEST
        self.sending_since_s: float | None = None
        self._receive = receive
        self._send = send
        self._is_id_valid = request_id is None or _REQUEST_ID.fullmatch(request_id) is not None
        self._request_id = request_id if request_id and self._is_id_valid else uuid.uuid4().hex
        self._task: asyncio.Task[Any] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._has_left = False
        self._has_started = False

    @classmethod
    def of(cls, scope: Scope) -> Exchange:
        """The exchange that a scope belongs to."""
        exchange: Exchange = scope[_SCOPE_KEY]
        return exchange

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Answer the request; returns without an answer if the client leaves."""
        self._task = asyncio.current_task()
        try:
            if not self._is_id_valid:
                raise InvalidRequestError(
                    "X-Request-Id must have 1 to 128 characters out of letters, digits and ._:/+=-.",
                    param="X-Request-Id",
                )
            await app(scope, self.receive, self.send)
            if self._has_left:
                await asyncio.sleep(0)  # let a cancellation that came too late arrive here, not in the server
        except asyncio.CancelledError:
            if not self._has_left:
                raise
            assert self._task is not None
            if self._task.uncancel() > 0:  # somebody else wants the task to end, too
                raise
        except ClientDisconnect:
            self._has_left = True
        except Exception as error:
            if self._has_started:
                raise
            await to_api_error(error).response()(scope, self.receive, self.send)
        finally:
            self._stop_watching()
            if self._has_left:
                self.status = CLIENT_CLOSED_REQUEST

    async def receive(self) -> Message:
        """Hand on the body; once it is complete, watch for the client to leave."""
        if self._watch is not None:
            await asyncio.shield(self._watch)
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._watch = asyncio.create_task(self._wait_for_disconnect())
        return message

    async def send(self, message: Message) -> None:
        """Hand on the response, with the request's id."""
        if message["type"] == "http.response.start":
            self._has_started = True
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._request_id.encode())]
        elif not message.get("more_body", False):
            self._stop_watching()  # servers report a completed response as a disconnect
        self.sending_since_s = time.monotonic()
        try:
            await self._send(message)
        except OSError:
            raise ClientDisconnect from None
        self.sending_since_s = None

    def push(self, part: bytes) -> asyncio.Task[None] | None:
        """Send a part of a response that has started; None if it is sent, else the task that waits for the client.

        Raises:
            ClientDisconnect: The connection is broken; the task may raise it, too.
        """
        task = start_eagerly(self._push(part))
        if task is not None:
            self.sending_since_s = time.monotonic()
        return task

    async def _push(self, part: bytes) -> None:
        try:
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
        except OSError:
            raise ClientDisconnect from None
        self.sending_since_s = None

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.give_up()

    def give_up(self) -> None:
        """End the request as if its client had left."""
        self._has_left = True
        assert self._task is not None
        self._task.cancel()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
