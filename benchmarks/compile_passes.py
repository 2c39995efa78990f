"""What each fusion pass gains: decode steps with all passes, without each of them, and without any.

One process, one model, one variant beside the other: every round times all of them, and the median is taken of the
ratios within a round, so that a ratio is not the machine's mood. "all passes, again" shows what noise is left. On CUDA
a step is the replay of a captured graph. On a CPU the model is made of plain torch operations for the occasion, as on a
GPU, since its native kernels leave passes nothing to do. Ends in one JSON line; a ratio above 1 is what leaving the
pass out costs.

    python -m benchmarks.compile_passes --device cuda
    python -m benchmarks.compile_passes --device cpu
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# Read by OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks.decode_run import Clock, DecodeRun
from benchmarks.shapes import shape_folder
from workers.compile.model import CompiledModel, compile_model
from workers.compile.passes.standard import standard_passes
from workers.config import CompilationConfig
from workers.kernels import cpu_ops, reference
from workers.model import decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", help="default: llama-1b on cuda, small on a cpu")
    parser.add_argument("--piece-format", default="standalone", choices=("standalone", "aoti"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, on a cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
        use_plain_forms()
    folder = shape_folder(args.shape or ("llama-1b" if args.device == "cuda" else "small"))
    with torch.inference_mode():
        run = DecodeRun(torch.device(args.device), folder, Clock(lambda: None), max(args.batch_sizes))
        models = {name: compile_variant(run, args.piece_format, switches) for name, switches in variants().items()}
        results = {size: compare(run, models, size, args.rounds) for size in args.batch_sizes}
    matches = dict(models["all passes"].report.passes)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(json.dumps({"benchmark": "compile_passes", "device": device, "matches": matches, "batch_sizes": results}))


def use_plain_forms() -> None:
    """Have the model on a CPU compute in plain torch, so that passes and compiler see every operation."""
    cpu_ops.is_available = lambda: False
    for name in ("rms_norm", "add_rms_norm", "silu_and_mul", "apply_rope"):
        setattr(decoder, name, getattr(reference, name))
    decoder.embedding = torch.nn.functional.embedding


def variants() -> dict[str, dict[str, bool]]:
    """Switches of each variant."""
    names = list(standard_passes().uuids())
    one_less = {f"without {name}": {name: False} for name in names}
    return {"all passes": {}, "all passes, again": {}, **one_less, "no passes": dict.fromkeys(names, False)}


def compile_variant(run: DecodeRun, piece_format: str, switches: dict[str, bool]) -> CompiledModel:
    """Compile in this process, for nobody else."""
    config = CompilationConfig(mode="VLLM_COMPILE", piece_format=piece_format, pass_config=switches)
    example = {"input_ids_T": run.ids(8), "positions_T": run.ids(8)}
    started = time.perf_counter()
    model = compile_model(run.model, config, example, splitting_ops=run.backend.splitting_ops)
    print(f"{switches or 'all passes'}: {time.perf_counter() - started:.1f} s, {model.report.passes}", file=sys.stderr)
    return model


def compare(run: DecodeRun, models: dict[str, CompiledModel], batch_size: int, num_rounds: int) -> dict[str, Any]:
    """Median microseconds of a step, and median ratio to all passes, for each variant."""
    context, ids_T, positions_T = run.decode_args(batch_size)
    times: dict[str, list[float]] = {name: [] for name in models}
    with context:
        steps = {name: make_step(run, model, ids_T, positions_T) for name, model in models.items()}
        for _ in range(num_rounds):
            for name, step in steps.items():
                run.wait()
                started = time.perf_counter()
                step()
                run.wait()
                times[name].append(time.perf_counter() - started)
    result = {}
    for name, values in times.items():
        ratio = statistics.median(mine / base for mine, base in zip(values, times["all passes"], strict=True))
        result[name] = {"step_us": round(statistics.median(values) * 1e6, 1), "ratio": round(ratio, 3)}
    print(f"batch {batch_size}: {json.dumps(result)}", file=sys.stderr)
    return result


def make_step(
    run: DecodeRun, model: CompiledModel, ids_T: torch.Tensor, positions_T: torch.Tensor
) -> Callable[[], object]:
    """One step, warmed up: a replay on CUDA, a call on a CPU."""
    for _ in range(3):
        model(ids_T, positions_T)
    if run.device.type != "cuda":
        return lambda: model(ids_T, positions_T)
    run.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(ids_T, positions_T)
    return graph.replay


if __name__ == "__main__":
    main()
