"""Decode step, first token and a mixed load through the offline ``LLM`` front; a rival runs by swapping the import.

    python -m benchmarks.offline --engine warmgraph --shape llama-1b --batch 1 8 32
    python -m benchmarks.offline --engine vllm --shape llama-1b --batch 1 8 32 --ttft 128 1024 8192 --mixed 64

Random weights, greedy. Decode step, for 128 prompt tokens: (time for 257 tokens - time for 1 token) / 256, scheduler
included. Time to first token: one request alone. Mixed load: that many requests at once, 32 to 1024 tokens in and 32 to
512 out. Everything is run once unmeasured, and the median of the repeats counts. The floor is every weight and every
live KV entry read once per step, at the bandwidth of a copy measured first. Ends in one JSON line.
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
    parser.add_argument("--ttft", type=int, nargs="*", default=[], help="prompt lengths")
    parser.add_argument("--mixed", type=int, default=0, help="requests of the mixed load")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--option", action="append", default=[], help="key=json for LLM(...), repeatable")
    args = parser.parse_args()
    options = {key: json.loads(value) for key, value in (option.split("=", 1) for option in args.option)}
    bandwidth = copy_bandwidth()
    started = time.perf_counter()
    longest = max([_PROMPT_TOKENS + _DECODE_STEPS + 1, 1536, *(length + 1 for length in args.ttft)])
    llm, params_class = _make(args.engine, args.shape, max([*args.batch, args.mixed]), longest, options)
    start_seconds = time.perf_counter() - started
    runs = Runs(llm, params_class, SHAPES[args.shape]["vocab_size"], args.repeats)
    rows = [_decode_row(runs, args, batch, bandwidth) for batch in args.batch]
    ttft = {length: _ttft(runs, args, length) for length in args.ttft}
    mixed = _mixed(runs, args) if args.mixed else None
    print(json.dumps(_report(args, options, start_seconds, bandwidth, rows, ttft, mixed)), flush=True)


def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes, on the default device."""
    if not torch.cuda.is_available():
        return float("nan")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    del source, target
    torch.cuda.empty_cache()
    return 2 * (1 << 30) / min(seconds)


def _make(engine: str, shape: str, max_batch: int, max_len: int, options: dict[str, Any]) -> tuple[Any, Any]:
    if engine == "vllm":
        from vllm import LLM, SamplingParams  # the rival; not a dependency
    else:
        from workers import LLM, SamplingParams
    defaults = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": max(4096, max_len),
        "max_num_seqs": max(max_batch, 8),
    }
    return LLM(model=str(shape_folder(shape)), **(defaults | options)), SamplingParams


class Runs:
    """Loads of random prompts on one engine, timed."""

    def __init__(self, llm: Any, params_class: Any, vocab_size: int, repeats: int) -> None:
        self._llm, self._params_class, self._vocab_size = llm, params_class, vocab_size
        self.repeats = repeats
        self._random = random.Random(0)

    def once(self, loads: list[tuple[int, int]]) -> float:
        """Seconds for (prompt tokens, output tokens) of every request, all submitted at once."""
        prompts = [
            {"prompt_token_ids": [self._random.randrange(self._vocab_size) for _ in range(length)]}
            for length, _ in loads
        ]
        params = [
            self._params_class(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
            for _, count in loads
        ]
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert [len(output.outputs[0].token_ids) for output in outputs] == [count for _, count in loads]
        return seconds

    def median(self, loads: list[tuple[int, int]]) -> float:
        """Median seconds of a load that has run before."""
        return statistics.median(self.once(loads) for _ in range(self.repeats))


def _decode_row(runs: Runs, args: argparse.Namespace, batch: int, bandwidth: float) -> dict[str, Any]:
    short, long = [(_PROMPT_TOKENS, 1)] * batch, [(_PROMPT_TOKENS, 1 + _DECODE_STEPS)] * batch
    runs.once(long)
    pairs = [(runs.once(short), runs.once(long)) for _ in range(runs.repeats)]
    step_ms = statistics.median(after - before for before, after in pairs) / _DECODE_STEPS * 1e3
    floor_ms = decode_bytes(args.shape, batch, _PROMPT_TOKENS + _DECODE_STEPS // 2) / bandwidth * 1e3
    row = {
        "batch": batch,
        "step_ms": round(step_ms, 3),
        "floor_ms": round(floor_ms, 3),
        "ttft_ms": round(statistics.median(before for before, _ in pairs) * 1e3, 2),
        "tokens_per_s": round(batch / step_ms * 1e3),
    }
    print(f"{args.engine} {args.shape} batch {batch}: step {step_ms:.3f} ms, ttft {row['ttft_ms']} ms", flush=True)
    return row


def _ttft(runs: Runs, args: argparse.Namespace, length: int) -> float:
    runs.once([(length, 1)])
    milliseconds = round(runs.median([(length, 1)]) * 1e3, 2)
    print(f"{args.engine} {args.shape} first token of {length}: {milliseconds} ms", flush=True)
    return milliseconds


def _mixed(runs: Runs, args: argparse.Namespace) -> dict[str, Any]:
    generator = random.Random(args.mixed)
    loads = [(generator.randint(32, 1024), generator.randint(32, 512)) for _ in range(args.mixed)]
    runs.once(loads)
    seconds = runs.median(loads)
    num_tokens = sum(length + count for length, count in loads)
    print(f"{args.engine} {args.shape} mixed load: {seconds:.3f} s, {num_tokens / seconds:.0f} tokens/s", flush=True)
    return {"requests": args.mixed, "seconds": round(seconds, 3), "tokens_per_s": round(num_tokens / seconds)}


def _report(
    args: argparse.Namespace,
    options: dict[str, Any],
    start_seconds: float,
    bandwidth: float,
    rows: list[dict[str, Any]],
    ttft: dict[int, float],
    mixed: dict[str, Any] | None,
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
        "copy_tb_per_s": round(bandwidth / 1e12, 2),
        "rows": rows,
        "ttft_ms": ttft,
        "mixed": mixed,
    }


if __name__ == "__main__":
    main()
