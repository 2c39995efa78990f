"""Decode step and time to first token on a CPU, beside transformers eager in the same run.

    python -m benchmarks.cpu_decode --threads 2

128 tokens in, 128 out, greedy, SmolLM2-135M-Instruct in bf16. The two engines take turns, because the speed of a
shared host drifts by a factor of two between runs: quote the ratios. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read by OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers

from cluster.models.importer import ensure_known_model
from cluster.models.progress import silent
from workers import LLM, SamplingParams

_PROMPT_TOKENS = 128
_OUTPUT_TOKENS = 128

#: Runs one batch; returns seconds to the first token and seconds per decode step after it.
Run = Callable[[torch.Tensor], tuple[float, float]]


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = Path(args.model) if Path(args.model).is_dir() else ensure_known_model(args.model, silent)
    runs = {"warmgraph": _warmgraph(folder, args), "transformers": _transformers(folder, args)}
    rows = [_compare(runs, batch, args.rounds) for batch in args.batch]
    print(json.dumps(_report(args, rows)), flush=True)


def _warmgraph(folder: Path, args: argparse.Namespace) -> Run:
    llm = LLM(
        str(folder),
        dtype=args.dtype,
        device="cpu",
        max_model_len=512,
        max_num_seqs=max(args.batch),
        max_num_batched_tokens=2048,
        num_threads=args.threads,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    params = SamplingParams(temperature=0.0, max_tokens=_OUTPUT_TOKENS, ignore_eos=True, detokenize=False)

    def run(ids_BT: torch.Tensor) -> tuple[float, float]:
        for row, ids in enumerate(ids_BT.tolist()):
            llm.engine.add_request(str(row), ids, params)
        started = time.perf_counter()
        llm.engine.step()
        first = time.perf_counter() - started
        steps = []
        while llm.engine.has_unfinished:
            started = time.perf_counter()
            llm.engine.step()
            steps.append(time.perf_counter() - started)
        return first, statistics.median(steps)

    return run


def _transformers(folder: Path, args: argparse.Namespace) -> Run:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()

    @torch.inference_mode()
    def run(ids_BT: torch.Tensor) -> tuple[float, float]:
        started = time.perf_counter()
        output = model(ids_BT, use_cache=True, logits_to_keep=1)
        next_B1 = output.logits.argmax(-1)
        first = time.perf_counter() - started
        steps = []
        for _ in range(_OUTPUT_TOKENS - 1):
            started = time.perf_counter()
            output = model(next_B1, past_key_values=output.past_key_values, use_cache=True)
            next_B1 = output.logits.argmax(-1)
            steps.append(time.perf_counter() - started)
        return first, statistics.median(steps)

    return run


def _compare(runs: dict[str, Run], batch: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        ids_BT = torch.randint(100, 40000, (batch, _PROMPT_TOKENS), generator=generator)
        for name, run in runs.items():
            result = run(ids_BT)
            if round_number > 0:  # the first round warms up
                results[name].append(result)
    row: dict[str, Any] = {"batch": batch}
    for name, pairs in results.items():
        row[f"{name}_step_ms"] = round(statistics.median(step for _, step in pairs) * 1e3, 2)
        row[f"{name}_ttft_ms"] = round(statistics.median(first for first, _ in pairs) * 1e3, 1)
    for index, what in ((1, "step"), (0, "ttft")):
        ratios = [
            ours[index] / theirs[index]
            for ours, theirs in zip(results["warmgraph"], results["transformers"], strict=True)
        ]
        row[f"{what}_ratio"] = round(statistics.median(ratios), 3)
    print(row, flush=True)
    return row


def _report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "benchmark": "cpu_decode",
        "dtype": args.dtype,
        "threads": args.threads,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
