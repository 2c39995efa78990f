"""CPU time per streamed token over all processes of a deployment, against a stub engine; prints one JSON line.

Usage: python -m benchmarks.data_path [--proxy haproxy|python] [--streams 64] [--step-ms 8] [--seconds 10]

The whole data path is real: proxy, ingress, fleet, replica and engine thread; only the engine computes nothing. All
streams run at once, one token per step. Counted is the CPU time of every process of the deployment (``/proc``)
between two moments while they do, divided by the tokens that the client received meanwhile; the client is a process
of its own, whose cost is reported apart. Every token is an event of its own; ``reads_per_token`` says how often the
client's socket brought several at once. ``idle_ms_per_s`` is what the processes take without a request: at few tokens
per second it weighs in every token. A step shorter than the machine can follow shows the most tokens per second; the
client then needs its part of the cores, and steps arrive together (``reads_per_token`` below 1).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.stub_engine import StubReplica, write_stub_model
from cluster.config import DeploymentConfig
from cluster.serving.local import running_deployment

#: Before HAProxy has checked a new ingress twice it sends to Ray's Python proxy; a spare process still starts, too.
_SETTLE_S = 15.0

#: Length of the look at the idle deployment.
_IDLE_S = 5.0

#: Opens all streams, waits until each has a token, then counts tokens and reads between two marks on standard input.
#: A bare epoll loop, since it shares the machine with what it measures.
_CLIENT = r"""
import os, select, socket, sys
port, path, num, body = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4].encode()
head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
poll, streams, waiting = select.epoll(), {}, set()
for _ in range(num):
    stream = socket.create_connection(("127.0.0.1", port))
    stream.sendall(head.encode() + body)
    stream.setblocking(False)
    streams[stream.fileno()] = stream
    waiting.add(stream.fileno())
    poll.register(stream, select.EPOLLIN)
tokens = reads = marks = 0
while marks < 2:
    for fd, _ in poll.poll():
        if fd == 0:
            os.read(0, 1)
            print(tokens, reads, flush=True)
            marks += 1
            continue
        data = streams[fd].recv(1 << 16)
        assert data, "a stream has ended"
        reads += 1
        tokens += data.count(b"data: ")
        if waiting and fd in waiting:
            assert b" 200 " in data[:20], data
            waiting.discard(fd)
            if not waiting:
                print("begun", flush=True)
                poll.register(0, select.EPOLLIN)
"""


def main() -> None:
    """Deploy, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", choices=("haproxy", "python"), default="haproxy")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="chat")
    parser.add_argument("--streams", type=int, default=64, help="concurrent streams")
    parser.add_argument("--step-ms", type=float, default=8.0, help="time of one engine step")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the measurement")
    parser.add_argument("--port", type=int, default=8018)
    args = parser.parse_args()
    os.environ["WARMGRAPH_STUB_STEP_S"] = str(args.step_ms / 1e3)
    with tempfile.TemporaryDirectory() as folder:
        config = DeploymentConfig.from_dict(
            {
                "models": [
                    {
                        "name": "stub",
                        "engine": {"model": str(write_stub_model(Path(folder))), "device": "cpu"},
                        "replicas": {"num_cpus": 0.1},
                    }
                ],
                "http": {"port": args.port, "proxy": args.proxy},
            }
        )
        with running_deployment(config, lambda phase: print(phase, file=sys.stderr), replica_class=StubReplica):
            result = _measure(args)
    print(json.dumps(result))


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    time.sleep(_SETTLE_S)
    idle_0 = _cpu_seconds()
    time.sleep(_IDLE_S)
    idle_1 = _cpu_seconds()
    path = "/v1/completions" if args.endpoint == "completions" else "/v1/chat/completions"
    prompt = {"prompt": "Hi"} if args.endpoint == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    body = json.dumps({"model": "stub", "stream": True, "max_tokens": 1_000_000, **prompt})
    client = subprocess.Popen(
        [sys.executable, "-c", _CLIENT, str(args.port), path, str(args.streams), body],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin is not None
    assert client.stdout is not None

    def mark() -> tuple[int, int, dict[str, float], float, float]:
        client.stdin.write("x")  # type: ignore[union-attr]  # asserted above
        client.stdin.flush()  # type: ignore[union-attr]
        tokens, reads = map(int, client.stdout.readline().split())  # type: ignore[union-attr]
        return tokens, reads, _cpu_seconds(client.pid), _total_s(psutil.Process(client.pid)), time.perf_counter()

    assert client.stdout.readline() == "begun\n"
    time.sleep(2.0)
    tokens_0, reads_0, cpu_0, client_0, clock_0 = mark()
    time.sleep(args.seconds)
    tokens_1, reads_1, cpu_1, client_1, clock_1 = mark()
    client.wait(30)
    tokens = tokens_1 - tokens_0
    by_process = {kind: 1e6 * (cpu_1[kind] - cpu_0.get(kind, 0.0)) / tokens for kind in cpu_1}
    return {
        "benchmark": "data_path",
        "unit": "us of CPU per token, all processes of the deployment",
        "proxy": args.proxy,
        "endpoint": args.endpoint,
        "us_per_token": round(sum(by_process.values()), 1),
        "by_process": {kind: round(value, 1) for kind, value in sorted(by_process.items())},
        "client_us_per_token": round(1e6 * (client_1 - client_0) / tokens, 1),
        "idle_ms_per_s": {kind: round(1e3 * (idle_1[kind] - idle_0.get(kind, 0.0)) / _IDLE_S, 1) for kind in idle_1},
        "tokens_per_s": round(tokens / (clock_1 - clock_0)),
        "reads_per_token": round((reads_1 - reads_0) / tokens, 3),
        "streams": args.streams,
        "step_ms": args.step_ms,
        "seconds": args.seconds,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def _cpu_seconds(client_pid: int | None = None) -> dict[str, float]:
    """CPU seconds so far of this process' descendants, by what they are; the client is left out."""
    seconds: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        if process.pid == client_pid:
            continue
        try:
            kind = _kind(process)
            seconds[kind] = seconds.get(kind, 0.0) + _total_s(process)
        except psutil.NoSuchProcess:
            continue
    return seconds


def _total_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _kind(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    kinds = {"engine-": "replica", ":ingress": "ingress", "Proxy": "proxy actor", "haproxy": "haproxy"}
    return next((kind for part, kind in kinds.items() if part in command), "ray")


if __name__ == "__main__":
    main()
