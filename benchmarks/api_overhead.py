"""CPU time of the HTTP layer per streamed token, against a stub engine; prints one JSON line.

Usage: python -m benchmarks.api_overhead [--streams 64] [--tokens 256] [--rounds 3]

The stub hands one token per step to each stream, as an engine does. What is counted is CPU time of this process
(``time.process_time``), after a warm-up; the median of the rounds is reported:

- ``stub``: the stub's streams with readers that do nothing: what is there without any HTTP layer (to be subtracted).
- ``chat``, ``completions``: the whole application as an ASGI callable, chunks thrown away.
- ``uvicorn_chat``: the same behind uvicorn on 127.0.0.1, read by another process. Includes the server's work and
  the system calls that send each chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from cluster.api.app import create_app
from cluster.api.client import ChunkSink
from cluster.api.metrics import HttpMetrics
from cluster.messages import GenerateRequest
from workers.outputs import FinishReason, TokenChunk

_WARM_UP_TOKENS = 32


class StubModel:
    """A model that says ``token`` as often as asked, to all its streams in lockstep; also its own directory."""

    name, created, max_model_len, vocab_size, tokenizer, is_ready = "stub", 0, 1 << 20, 256, None, True

    def __init__(self, num_streams: int) -> None:
        self._num_streams = num_streams
        self._streams: dict[str, tuple[ChunkSink, asyncio.Future[None]]] = {}
        self._full = asyncio.Event()

    def lookup(self, name: str) -> StubModel:
        return self

    def models(self) -> list[StubModel]:
        return [self]

    async def generate(self, request: GenerateRequest, on_chunks: ChunkSink) -> None:
        ended = asyncio.get_running_loop().create_future()
        self._streams[request.request_id] = on_chunks, ended
        if len(self._streams) == self._num_streams:
            self._full.set()
        await ended

    async def run(self, num_tokens: int) -> float:
        """Wait for all streams, then play the steps; returns the CPU seconds that the steps took."""
        await self._full.wait()
        started_s = 0.0
        for step in range(-_WARM_UP_TOKENS, num_tokens):
            if step == 0:
                started_s = time.process_time()
            reason = FinishReason.LENGTH if step == num_tokens - 1 else None
            for request_id, (on_chunks, _) in self._streams.items():
                on_chunks([TokenChunk(request_id, token_ids=[7], text=" token", finish_reason=reason)])
            await asyncio.sleep(0)  # a server sends at the end of a turn of the loop
        seconds = time.process_time() - started_s
        for _, ended in self._streams.values():
            ended.set_result(None)
        return seconds


class TokenizedStub(StubModel):
    """The stub with a tokenizer in name, so that chats can be rendered."""

    class _Tokenizer:
        def encode(self, text: str, /, add_special_tokens: bool = True) -> list[int]:
            return [1, 2, 3]

        def decode(self, token_ids: list[int], /) -> str:
            return ""

        def render_chat(self, messages: list[dict[str, Any]], /, **_: Any) -> str:
            return "chat"

    tokenizer: Any = _Tokenizer()


def make_app(stub: StubModel) -> FastAPI:
    """The application on top of the stub."""
    return create_app(stub, HttpMetrics(CollectorRegistry()))


def request_body(path: str, num_tokens: int) -> bytes:
    """A streamed request for all the tokens of a round."""
    body: dict[str, Any] = {"model": "stub", "stream": True, "max_tokens": num_tokens + _WARM_UP_TOKENS}
    if path.endswith("chat/completions"):
        return json.dumps({**body, "messages": [{"role": "user", "content": "Hi"}]}).encode()
    return json.dumps({**body, "prompt": "Hi"}).encode()


async def measure_stub(num_streams: int, num_tokens: int) -> float:
    """The stub's streams, with readers that do nothing."""
    stub = TokenizedStub(num_streams)

    def read(number: int) -> Coroutine[Any, Any, None]:
        return stub.generate(GenerateRequest(str(number), [1], None), lambda chunks: None)  # type: ignore[arg-type]  # not read

    readers = [asyncio.create_task(read(number)) for number in range(num_streams)]
    seconds = await stub.run(num_tokens)
    await asyncio.gather(*readers)
    return seconds


async def measure_asgi(path: str, num_streams: int, num_tokens: int) -> float:
    """The application called in process, chunks thrown away."""
    stub = TokenizedStub(num_streams)
    app, body = make_app(stub), request_body(path, num_tokens)

    async def call() -> None:
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return unread.pop() if unread else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            assert message.get("status", 200) == 200, message

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
        }
        await app(scope, receive, send)

    calls = [asyncio.create_task(call()) for _ in range(num_streams)]
    seconds = await stub.run(num_tokens)
    await asyncio.gather(*calls)
    return seconds


async def measure_uvicorn(path: str, num_streams: int, num_tokens: int) -> float:
    """The application behind uvicorn, read by another process over loopback."""
    stub = TokenizedStub(num_streams)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2 * num_streams)
    config = uvicorn.Config(make_app(stub), ws="none", log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    reader = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _READER,
        str(listener.getsockname()[1]),
        path,
        str(num_streams),
        stdin=asyncio.subprocess.PIPE,
    )
    assert reader.stdin is not None
    reader.stdin.write(request_body(path, num_tokens))
    reader.stdin.close()
    seconds = await stub.run(num_tokens)
    assert await reader.wait() == 0
    server.should_exit = True
    await serving
    return seconds


#: Opens all the streams, and reads each to its end without looking into it.
_READER = """
import asyncio, sys
port, path, num_streams = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
body = sys.stdin.buffer.read()
head = f"POST {path} HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\nConnection: close\\r\\n"
request = (head + f"Content-Length: {len(body)}\\r\\n\\r\\n").encode() + body
async def one():
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    last = b""
    while data := await reader.read(65536):
        last = (last + data)[-64:]
    assert b"[DONE]" in last, last
    writer.close()
async def main():
    await asyncio.gather(*[one() for _ in range(num_streams)])
asyncio.run(main())
"""


def main() -> None:
    """Measure every variant in turn, round by round, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64, help="concurrent streams")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per stream")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, interleaved; the median counts")
    args = parser.parse_args()
    variants: dict[str, Callable[[int, int], Awaitable[float]]] = {
        "stub": measure_stub,
        "chat": lambda streams, tokens: measure_asgi("/v1/chat/completions", streams, tokens),
        "completions": lambda streams, tokens: measure_asgi("/v1/completions", streams, tokens),
        "uvicorn_chat": lambda streams, tokens: measure_uvicorn("/v1/chat/completions", streams, tokens),
    }
    microseconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, measure in variants.items():
            seconds = asyncio.run(_awaited(measure(args.streams, args.tokens)))
            microseconds[name].append(1e6 * seconds / (args.streams * args.tokens))
    print(
        json.dumps(
            {
                "benchmark": "api_overhead",
                "unit": "us of CPU per token",
                **{name: round(statistics.median(values), 1) for name, values in microseconds.items()},
                "streams": args.streams,
                "tokens": args.tokens,
                "rounds": args.rounds,
                "python": platform.python_version(),
                "cpus": os.cpu_count(),
            }
        )
    )


async def _awaited(value: Awaitable[float]) -> float:
    return await value


if __name__ == "__main__":
    main()
