"""Streams on a real cluster while its replicas are killed; every token is compared. Prints one JSON line.

Usage: python -m benchmarks.chaos [--streams 200] [--replicas 3] [--kills 10] [--interval-s 4]

Keeps ``--streams`` streams open against CPU replicas of a tiny random model (greedy, seeded, with penalties,
log-probabilities and stop strings in turn) and SIGKILLs a random replica every few seconds, never the only one. What
each client gets is compared with what an engine that nobody disturbs says. Exits with 1 unless all is zero.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import DeploymentConfig
from cluster.serving.local import running_deployment
from tests.cluster.chaos import kill_replicas, make_cases, stream_during
from tests.model_fixtures import write_tiny_gguf
from workers import LLM
from workers.checkpoint.convert import convert_gguf

_MODEL = "tiny"


def main() -> None:
    """Deploy, disturb, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, help="streams that are open at any time")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10, help="how many replicas are killed")
    parser.add_argument("--interval-s", type=float, default=4.0, help="pause between kills")
    parser.add_argument("--port", type=int, default=8019)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        convert_gguf(write_tiny_gguf(Path(folder) / "tiny.gguf"), model)
        cases = make_cases(LLM(str(model), dtype="float32", device="cpu", max_num_seqs=16), 40)
        config = _config(args, model)
        with running_deployment(config, lambda phase: print(phase, file=sys.stderr)) as url:
            started = time.perf_counter()
            results, num_kills = asyncio.run(
                stream_during(
                    url,
                    _MODEL,
                    cases,
                    args.streams,
                    lambda: kill_replicas(os.getpid(), args.kills, args.interval_s),
                )
            )
            seconds = time.perf_counter() - started
            leaked = _leaked_blocks(url, args.replicas)
    verdicts = collections.Counter(received.verdict(case.expected) for case, received in results)
    pauses = sorted(received.longest_pause_s for _, received in results)
    report = {
        "benchmark": "chaos",
        "streams": len(results),
        "concurrent": args.streams,
        "replicas": args.replicas,
        "kills": num_kills,
        "seconds": round(seconds, 1),
        "tokens": sum(len(received.token_ids) for _, received in results),
        **{verdict: verdicts[verdict] for verdict in ("ok", "failed", "truncated", "different")},
        "leaked_blocks": leaked,
        "longest_pause_s": {"p50": round(pauses[len(pauses) // 2], 2), "max": round(pauses[-1], 2)},
        "errors": dict(collections.Counter(received.error for _, received in results if received.error).most_common(3)),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
    }
    print(json.dumps(report))
    sys.exit(0 if verdicts["ok"] == len(results) and leaked == 0 else 1)


def _config(args: argparse.Namespace, model: Path) -> DeploymentConfig:
    engine = {"model": str(model), "dtype": "float32", "device": "cpu", "max_num_seqs": 64, "num_threads": 1}
    replicas: dict[str, Any] = {
        "num_replicas": args.replicas,
        "num_cpus": 0.1,
        "max_queued_requests": args.streams,
        "health_check_period_s": 1,
        "start_timeout_s": 300,
    }
    return DeploymentConfig.from_dict(
        {"models": [{"name": _MODEL, "engine": engine, "replicas": replicas}], "http": {"port": args.port}}
    )


def _leaked_blocks(url: str, num_replicas: int) -> int | None:
    """Blocks that are held although nothing runs, once all replicas are back; None if they do not come back."""
    leaked = None
    for _ in range(240):
        time.sleep(0.5)
        with contextlib.suppress(httpx.HTTPError):
            values: dict[str, float] = collections.defaultdict(float)
            text = httpx.get(f"{url}/metrics", timeout=30).text
            samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
            for sample in samples:
                values[sample.name] += sample.value
            num_seen = sum(sample.name == "warmgraph_kv_blocks" for sample in samples)
            leaked = int(values["warmgraph_kv_blocks"] - values["warmgraph_kv_blocks_free"])
            if num_seen == num_replicas and leaked == 0:
                return 0
    return leaked


if __name__ == "__main__":
    main()
