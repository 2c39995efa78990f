"""Start of a compiled model: cold, and warm in a fresh process, for each piece format, against eager.

Every phase is a process of its own with empty compiler caches: what is warm comes from the piece store alone. A phase
imports, loads dummy weights, compiles or loads, prefills a few requests and decodes greedily. ``to_first_token_s`` is
everything after imports and weights; ``vs_eager`` its ratio to eager's. With ``--rounds`` eager and the warm phases
take turns, and medians are taken, of ratios within a round. Ends in one JSON line.

    python -m benchmarks.compile_warm_start --device cuda          # Llama-1B shape, bf16
    python -m benchmarks.compile_warm_start --device cpu           # 12 layers, 512 wide, fp32
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shapes import SHAPES

if TYPE_CHECKING:
    from benchmarks.decode_run import DecodeRun

_STARTED = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--shape", choices=("llama-1b", "llama-8b", "small"), help="default: llama-1b on cuda, small on cpu"
    )
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--formats", nargs="+", help="piece formats; default: standalone aoti, and fx on a cpu")
    parser.add_argument("--modes", action="store_true", help="also time modes STOCK_TORCH_COMPILE, DYNAMO_TRACE_ONCE")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="batch sizes to compile pieces for once more")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each phase, on a cpu")
    parser.add_argument("--rounds", type=int, default=1, help="of the eager and the warm phases")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = args.shape or ("llama-1b" if args.device == "cuda" else "small")
    if args.phase:
        print(json.dumps(run_phase(args)))
        return
    print(json.dumps(run_all(args)))


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Every phase in its own process."""
    formats = args.formats or (["standalone", "aoti"] if args.device == "cuda" else ["fx", "standalone", "aoti"])
    phases = ["eager", *(f"{stage}-{name}" for name in formats for stage in ("cold", "warm"))]
    phases += ["stock_torch_compile", "dynamo_trace_once"] if args.modes else []
    with tempfile.TemporaryDirectory() as folder:
        config = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
        (Path(folder) / "config.json").write_text(json.dumps(config))
        results = {phase: start_phase(args, phase, Path(folder)) for phase in phases}
        quick = [phase for phase in phases if phase == "eager" or phase.startswith("warm")]
        rounds = [{phase: results[phase] for phase in quick}]
        rounds += [{phase: start_phase(args, phase, Path(folder)) for phase in quick} for _ in range(args.rounds - 1)]
    tokens = {phase: result.pop("tokens", None) for phase, result in results.items()}
    first_pieces = next(phase for phase in phases if phase.startswith("cold"))
    for phase, result in results.items():
        # Random weights make near-ties, and bf16 breaks them by rounding: kernels of one compiler must agree, and
        # those of eager nearly. In fp32 all must agree.
        for name, other in (("eager", "eager"), ("pieces", first_pieces)):
            result[f"tokens_as_{name}"] = _agreement(tokens[phase], tokens[other])
        if "to_first_token_s" in result:
            result |= _against_eager(phase, rounds if phase in quick else [results])
        print(f"{phase:>20}: {json.dumps(result)}", file=sys.stderr)
    return {"benchmark": "compile_warm_start", "device": args.device, "shape": args.shape, "phases": results}


def _against_eager(phase: str, rounds: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds: seconds to the first token, of them to load, and the ratio to eager's within a round."""
    seconds = [one[phase]["to_first_token_s"] for one in rounds]
    ratios = [mine / one["eager"]["to_first_token_s"] for mine, one in zip(seconds, rounds, strict=True)]
    medians = {
        "to_first_token_s": statistics.median(seconds),
        "compile_s": statistics.median(one[phase]["compile_s"] for one in rounds),
        "vs_eager": statistics.median(ratios),
    }
    spread = {"rounds": seconds} if len(rounds) > 1 else {}
    return {name: round(value, 3) for name, value in medians.items()} | spread


def _agreement(tokens: list[int] | None, others: list[int] | None) -> float:
    """Share of positions with the same token."""
    pairs = list(zip(tokens or [], others or [], strict=False))
    return round(sum(left == right for left, right in pairs) / max(len(pairs), 1), 3)


def start_phase(args: argparse.Namespace, phase: str, folder: Path) -> dict[str, Any]:
    """Run one phase with compiler caches of its own; a phase that fails says so and stops nothing."""
    caches = Path(tempfile.mkdtemp(dir=folder))
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.compile_warm_start",
        "--device",
        args.device,
        "--shape",
        args.shape,
        "--threads",
        str(args.threads),
    ]
    command += ["--phase", phase, "--folder", str(folder), "--sizes", *map(str, args.sizes)]
    started = time.perf_counter()
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        print(process.stderr[-4000:], file=sys.stderr)
        return {"failed": process.stderr.strip().splitlines()[-1:], "returncode": process.returncode}
    result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return result | {"process_s": round(time.perf_counter() - started, 3)}


def run_phase(args: argparse.Namespace) -> dict[str, Any]:
    """One process's work."""
    import torch

    import_torch_s = time.perf_counter() - _STARTED
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    for module in ("workers.artifacts.library", "workers.compile.model", "workers.config"):
        importlib.import_module(module)
    from benchmarks.decode_run import Clock, DecodeRun
    from workers.compile.counters import compiler_activity

    import_library_s = time.perf_counter() - started
    clock = Clock(torch.cuda.synchronize if args.device == "cuda" else lambda: None)
    with torch.inference_mode():
        run = DecodeRun(torch.device(args.device), args.folder, clock)
        clock.lap("weights_s")
        result = measure(run, args.phase, args.folder, args.sizes)
    return {
        "import_torch_s": round(import_torch_s, 3),
        "import_library_s": round(import_library_s, 3),
        **clock.laps,
        "to_first_token_s": round(clock.laps["compile_s"] + clock.laps["first_token_s"], 4),
        **result,
        "compiler_imported": "torch._dynamo" in sys.modules or "torch._inductor" in sys.modules,
        "activity": compiler_activity(),
    }


def measure(run: DecodeRun, phase: str, folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Compile or load, then the first call, the tokens, and the host's time per decode step."""
    from workers.artifacts.library import ArtifactLibrary
    from workers.compile import compile_model
    from workers.compile.prefetch import wait_for_compiler
    from workers.config import ArtifactConfig, CompilationConfig
    from workers.modes import CompilationMode

    clock, files_before = run.clock, cache_files()
    stage, _, piece_format = phase.partition("-")
    if piece_format == "standalone":
        wait_for_compiler()
    clock.lap("import_compiler_s")
    modes = {"eager": "NONE", "cold": "VLLM_COMPILE", "warm": "VLLM_COMPILE"}
    config = CompilationConfig(
        mode=CompilationMode[modes.get(stage, stage.upper())], piece_format=piece_format or "auto", compile_sizes=sizes
    )
    library = ArtifactLibrary.from_config(ArtifactConfig(self_check="off"), folder / f"store-{piece_format}")
    example = {"input_ids_T": run.ids(8), "positions_T": run.ids(8)}
    model = compile_model(run.model, config, example, splitting_ops=run.backend.splitting_ops, library=library)
    clock.lap("compile_s")
    assert model.report.is_warm is (stage == "warm")
    tokens = run.generate(model)
    result: dict[str, Any] = {"tokens": tokens, "unique_pieces": model.report.num_unique_pieces}
    result["new_cache_files"] = cache_files() - files_before
    if model.plan is not None:
        builds = [
            build for piece in model.plan.pieces.values() for build in piece.builds if build.format == piece_format
        ]
        result["builds"] = [(build.seconds, build.num_bytes) for build in builds]
        result["passes"] = dict(model.report.passes)
    result["decode_step_us"] = run.time_decode(model)
    if run.device.type == "cuda":
        result["graph"] = run.time_graph(model)
    return result


def cache_files() -> int:
    """Kernels and programs that Inductor and Triton have written in this phase: what was compiled."""
    folders = (Path(os.environ[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"))
    return sum(1 for folder in folders for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
