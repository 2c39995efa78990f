"""Serving over HTTP on a CPU: start-up by phase, first token, throughput at 1 to 32 streams, peak memory.

    python -m benchmarks.serving_cpu --replicas 1 --threads 2

Starts ``warmgraph serve`` on the default model in a process of its own, sends streamed completions (128 tokens in,
128 out) and stops it. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import re
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import torch

from cluster.bench.client import Target
from cluster.bench.driver import run_load
from cluster.bench.report import summarize
from cluster.bench.workload import Lengths, Workload

_MODEL = "smollm2-135m-instruct"
_PROMPT_TOKENS = 128
_OUTPUT_TOKENS = 128
_PHASE = re.compile(r"^\s*([\d.]+) s (.+)$")


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/smollm2-cpu.yaml")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=8017)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 32])
    args = parser.parse_args()
    command = [sys.executable, "-m", "cluster.cli.main", "serve", args.config]
    for override in (
        f"http.port={args.port}",
        f"models.0.replicas.num_replicas={args.replicas}",
        f"models.0.engine.num_threads={args.threads}",
    ):
        command += ["--set", override]
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        phases = _read_phases(process)
        url = f"http://127.0.0.1:{args.port}"
        ready = time.perf_counter() - started
        _load(url, 1, 1)
        first_token = time.perf_counter() - started
        rows = [_measure(url, streams) for streams in args.streams]
        memory = _memory_mib(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    report = {
        "benchmark": "serving_cpu",
        "model": _MODEL,
        "replicas": args.replicas,
        "threads_per_replica": args.threads,
        "phases_s": phases,
        "ready_s": round(ready, 1),
        "first_token_s": round(first_token, 1),
        "rows": rows,
        "memory_mib": memory,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(report), flush=True)


def _read_phases(process: subprocess.Popen[str]) -> dict[str, float]:
    """When each phase of the start began, in seconds, as the command prints them."""
    assert process.stderr is not None
    phases: dict[str, float] = {}
    for line in process.stderr:
        match = _PHASE.match(line)
        if match:
            phases[match.group(2).strip()] = float(match.group(1))
        if "Ctrl-C" in line:
            return phases
    raise SystemExit(f"warmgraph serve ended with status {process.wait()}")


def _load(url: str, streams: int, output_tokens: int) -> dict[str, Any]:
    """Send ``streams`` requests at once; what :func:`summarize` says of them."""
    lengths = Lengths(_PROMPT_TOKENS, _PROMPT_TOKENS), Lengths(output_tokens, output_tokens)
    workload = Workload(*lengths, vocab_size=40000, seed=streams)
    target = Target(url, _MODEL, "completions", {"temperature": 0, "ignore_eos": True}, {})
    summary = summarize(*asyncio.run(run_load(target, workload.requests(streams), None, 600.0)))
    assert not summary["errors"], summary["errors"]
    assert summary["output_tokens"] == streams * output_tokens
    return summary


def _measure(url: str, streams: int) -> dict[str, Any]:
    summary = _load(url, streams, _OUTPUT_TOKENS)
    row = {
        "streams": streams,
        "tokens_per_s": summary["output_tokens_per_s"],
        "ttft_ms": summary["ttft_ms"]["p50"],
        "inter_token_ms": summary["inter_token_ms"]["mean"],
    }
    print(row, flush=True)
    return row


def _memory_mib(pid: int) -> dict[str, int]:
    """Peak resident memory by kind of process."""
    memory: dict[str, int] = {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            name = " ".join(process.cmdline())[:120]
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as status:
                peak = next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))
        except (psutil.NoSuchProcess, FileNotFoundError, StopIteration):
            continue
        kind = "engine" if "engine-" in name else "ingress" if "ingress" in name else "ray"
        memory[kind] = memory.get(kind, 0) + peak
    return memory


if __name__ == "__main__":
    main()
