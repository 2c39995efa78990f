"""Decode step and time to first token through the offline ``LLM`` front; a rival runs by swapping the import.

    python -m benchmarks.offline --engine warmgraph --shape llama-1b --batch 1 8 32
    python -m benchmarks.offline --engine vllm --shape llama-1b --batch 1 8 32

Random weights, 128 prompt tokens, greedy. Decode step = (time for 257 tokens - time for 1 token) / 256, scheduler
included; the median of the repeats. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from typing import Any

import torch

from benchmarks.shapes import SHAPES, decode_bytes, shape_folder

_PROMPT_TOKENS = 128
_DECODE_STEPS = 256


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("warmgraph", "vllm"), default="warmgraph")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, default=4.28e12, help="device memory, bytes/s, for the floor")
    parser.add_argument("--option", action="append", default=[], help="key=json for LLM(...), repeatable")
    args = parser.parse_args()
    options = {key: json.loads(value) for key, value in (option.split("=", 1) for option in args.option)}
    started = time.perf_counter()
    llm, params_class = _make(args.engine, args.shape, max(args.batch), options)
    start_seconds = time.perf_counter() - started
    rows = [_measure(llm, params_class, args, batch) for batch in args.batch]
    print(json.dumps(_report(args, options, start_seconds, rows)), flush=True)


def _make(engine: str, shape: str, max_batch: int, options: dict[str, Any]) -> tuple[Any, Any]:
    if engine == "vllm":
        from vllm import LLM, SamplingParams  # the rival; not a dependency
    else:
        from workers import LLM, SamplingParams
    defaults = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 4096,
        "max_num_seqs": max(max_batch, 8),
    }
    return LLM(model=str(shape_folder(shape)), **(defaults | options)), SamplingParams


def _measure(llm: Any, params_class: Any, args: argparse.Namespace, batch: int) -> dict[str, Any]:
    vocab = SHAPES[args.shape]["vocab_size"]
    generator = random.Random(batch)

    def run(num_tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [generator.randrange(vocab) for _ in range(_PROMPT_TOKENS)]} for _ in range(batch)
        ]
        params = params_class(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
        return seconds

    run(1 + _DECODE_STEPS)  # kernels are loaded, and what is captured when batches ask for it is captured
    pairs = [(run(1), run(1 + _DECODE_STEPS)) for _ in range(args.repeats)]
    step_ms = statistics.median(long - short for short, long in pairs) / _DECODE_STEPS * 1e3
    floor_ms = decode_bytes(args.shape, batch, _PROMPT_TOKENS + _DECODE_STEPS // 2) / args.bandwidth * 1e3
    row = {
        "batch": batch,
        "step_ms": round(step_ms, 3),
        "floor_ms": round(floor_ms, 3),
        "ttft_ms": round(statistics.median(short for short, _ in pairs) * 1e3, 2),
        "tokens_per_s": round(batch / step_ms * 1e3),
    }
    print(f"{args.engine} {args.shape} batch {batch}: step {step_ms:.3f} ms, ttft {row['ttft_ms']} ms", flush=True)
    return row


def _report(
    args: argparse.Namespace, options: dict[str, Any], start_seconds: float, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    return {
        "benchmark": "offline",
        "engine": args.engine,
        "shape": args.shape,
        "options": options,
        "device": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "start_seconds": round(start_seconds, 1),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
