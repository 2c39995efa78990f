"""Capturing every default size of a shape: how long, how many graphs, how much memory, and ready after how much of it.

    python -m benchmarks.graph_capture                                    # Llama-1B shape, on a GPU
    python -m benchmarks.graph_capture --shape tiny --device cpu          # the host backend, on any machine

Random weights. The engine is ready after its first set; the rest is captured in one idle gap after another, as a
replica without requests does. The first warm-up run compiles kernels and is left out of the total, as it is needed
without graphs too. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import torch

from benchmarks.shapes import SHAPES, shape_folder
from workers.config import EngineConfig
from workers.engine.engine import Engine


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--first", choices=("default", "all"), default="default", help="what is captured before ready")
    parser.add_argument("--compilation", default="{}", help="JSON: further fields of compilation_config")
    args = parser.parse_args()
    print(json.dumps(measure(args)), flush=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start an engine, capture the rest, and gather the figures."""
    compilation = {"mode": "VLLM_COMPILE", "cudagraph_mode": "FULL_AND_PIECEWISE"}
    if args.first == "all":
        compilation["cudagraph_first_sizes"] = "all"
    config = EngineConfig.create(
        model=str(shape_folder(args.shape)),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32" if args.device == "cpu" else "auto",
        device=args.device,
        max_model_len=2048,
        max_num_seqs=args.max_num_seqs,
        compilation_config=compilation | json.loads(args.compilation),
    )
    started = time.perf_counter()
    engine = Engine(config)
    start_s = time.perf_counter() - started
    ready = engine.graph_report()
    gaps = _capture_the_rest(engine)
    report = engine.graph_report()
    assert report.pending == 0
    return {
        "benchmark": "graph_capture",
        "shape": args.shape,
        "max_num_seqs": args.max_num_seqs,
        "device": torch.cuda.get_device_name() if report.backend == "cuda" else platform.machine(),
        "backend": report.backend,
        "torch": torch.__version__,
        "mode": report.mode,
        "sizes": len(report.capture_sizes),
        "keys": len(report.graphs),
        "graphs": report.captured,
        "keys_when_ready": sum(row.state == "captured" for row in ready.graphs),
        "start_s": round(start_s, 2),
        "first_warm_up_s": round(report.first_warm_up_seconds, 4),
        "ready_beyond_first_warm_up_s": round(ready.first_set_seconds - report.first_warm_up_seconds, 4),
        "all_beyond_first_warm_up_s": round(report.first_set_seconds + sum(gaps) - report.first_warm_up_seconds, 4),
        "of_it_warm_up_s": round(report.warm_up_seconds - report.first_warm_up_seconds, 4),
        "of_it_recording_s": round(report.capture_seconds, 4),
        "longest_idle_capture_s": round(max(gaps, default=0.0), 4),
        "memory_mib": round(report.memory_bytes / (1 << 20), 2),
        "memory_when_ready_mib": round(ready.memory_bytes / (1 << 20), 2),
        "left_out": [row.dropped_because for row in report.graphs if row.state == "dropped"],
    }


def _capture_the_rest(engine: Engine) -> list[float]:
    """Seconds of each idle capture."""
    gaps = []
    while True:
        started = time.perf_counter()
        if not engine.use_idle_time():
            return gaps
        gaps.append(time.perf_counter() - started)


if __name__ == "__main__":
    main()
