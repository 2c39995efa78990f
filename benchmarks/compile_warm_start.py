"""Start of a compiled model: cold, and warm in a fresh process, for each piece format, against eager.

Every phase is a process of its own with empty compiler caches: what is warm comes from the piece store alone. A phase
loads dummy weights, compiles or loads, prefills a few requests and decodes greedily. Ends in one JSON line.

    python benchmarks/compile_warm_start.py --device cuda          # Llama-1B shape, bf16
    python benchmarks/compile_warm_start.py --device cpu           # 12 layers, 512 wide, fp32
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STARTED = time.perf_counter()

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": _LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "dtype": "bfloat16",
    },
    "small": _LLAMA
    | {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "dtype": "float32",
    },
}
NUM_REQUESTS, PROMPT_LEN, NUM_STEPS, BLOCK_SIZE = 4, 32, 16, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: llama-1b on cuda, small on cpu")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--formats", nargs="+", help="piece formats; default: standalone aoti, and fx on a cpu")
    parser.add_argument("--modes", action="store_true", help="also time modes STOCK_TORCH_COMPILE, DYNAMO_TRACE_ONCE")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="batch sizes to compile pieces for once more")
    parser.add_argument("--ablation", action="store_true", help="also time pieces without each of the passes")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each phase, on a cpu")
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
    if args.ablation:
        from workers.compile.passes.standard import standard_passes

        phases += [f"without-{name}" for name in standard_passes().uuids()]
    with tempfile.TemporaryDirectory() as folder:
        config = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
        (Path(folder) / "config.json").write_text(json.dumps(config))
        results = {phase: start_phase(args, phase, Path(folder)) for phase in phases}
    tokens = {phase: result.pop("tokens", None) for phase, result in results.items()}
    first_pieces = next(phase for phase in phases if phase.startswith("cold"))
    for phase, result in results.items():
        # Random weights make near-ties, and bf16 breaks them by rounding: kernels of one compiler must agree, and
        # those of eager nearly. In fp32 all must agree.
        for name, other in (("eager", "eager"), ("pieces", first_pieces)):
            result[f"tokens_as_{name}"] = _agreement(tokens[phase], tokens[other])
        print(f"{phase:>20}: {json.dumps(result)}", file=sys.stderr)
    return {"benchmark": "compile_warm_start", "device": args.device, "shape": args.shape, "phases": results}


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
    command = [sys.executable, __file__, "--device", args.device, "--shape", args.shape, "--threads", str(args.threads)]
    command += ["--phase", phase, "--folder", str(folder), "--sizes", *map(str, args.sizes)]
    started = time.perf_counter()
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        print(process.stderr[-4000:], file=sys.stderr)
        return {"failed": process.stderr.strip().splitlines()[-1:], "returncode": process.returncode}
    result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return result | {"process_s": round(time.perf_counter() - started, 3)}


class Clock:
    """Seconds between marks, with the device's work waited for."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.laps: dict[str, float] = {}
        self._synchronize = synchronize
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Everything since the last mark is called ``name``."""
        self._synchronize()
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 4)
        self._last = now


def run_phase(args: argparse.Namespace) -> dict[str, Any]:
    """One process's work."""
    import torch

    import_torch_s = time.perf_counter() - _STARTED
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    clock = Clock(torch.cuda.synchronize if args.device == "cuda" else lambda: None)
    with torch.inference_mode():
        run = DecodeRun(torch.device(args.device), args.folder, clock)
        clock.lap("weights_s")
        result = measure(run, args.phase, args.folder, args.sizes)
    from workers.compile.counters import compiler_activity

    return {
        "import_torch_s": round(import_torch_s, 3),
        **clock.laps,
        **result,
        "compiler_imported": "torch._dynamo" in sys.modules or "torch._inductor" in sys.modules,
        "activity": compiler_activity(),
    }


def measure(run: DecodeRun, phase: str, folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Compile or load, then the first call, the tokens, and the host's time per decode step."""
    from workers.artifacts.library import ArtifactLibrary
    from workers.compile import compile_model
    from workers.config import ArtifactConfig, CompilationConfig
    from workers.modes import CompilationMode

    clock, files_before = run.clock, cache_files()
    stage, _, name = phase.partition("-")
    has_pieces = stage in ("cold", "warm", "without")
    is_ablation = stage == "without"
    piece_format = "standalone" if is_ablation else name or "auto"
    if piece_format == "standalone":
        from workers.compile.prefetch import wait_for_compiler

        wait_for_compiler()
    clock.lap("import_compiler_s")
    mode = CompilationMode.VLLM_COMPILE if has_pieces else CompilationMode[{"eager": "NONE"}.get(stage, stage.upper())]
    config = CompilationConfig(
        mode=mode,
        piece_format=piece_format,
        pass_config={name: False} if is_ablation else {},
        compile_sizes=sizes,
    )
    library = ArtifactLibrary.from_config(ArtifactConfig(self_check="off"), folder / "store")
    example = {"input_ids_T": run.ids(8), "positions_T": run.ids(8)}
    ops = run.backend.splitting_ops
    model = compile_model(run.model, config, example, splitting_ops=ops, library=library)
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


class DecodeRun:
    """A model with dummy weights, its attention and caches, and a fixed batch of requests.

    Args:
        folder: Holds config.json.
    """

    def __init__(self, device: Any, folder: Path, clock: Clock) -> None:
        import torch

        from workers.attention.selector import make_backend
        from workers.model.config import ModelConfig
        from workers.model.loader import load_model

        self.device, self.clock = device, clock
        model_config = ModelConfig.from_folder(folder)
        dtype = getattr(torch, model_config.dtype)
        self.model = load_model(folder, model_config, dtype, device, "dummy", max_model_len=1024)
        self.backend = make_backend("auto", self.model.attention_spec(BLOCK_SIZE), device)
        if hasattr(self.backend, "warmup"):
            self.backend.warmup()
        self.blocks_per_request = (PROMPT_LEN + NUM_STEPS) // BLOCK_SIZE + 2
        shape = self.backend.kv_cache_shape(NUM_REQUESTS * self.blocks_per_request)
        layers = range(model_config.num_hidden_layers)
        self.kv_caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def ids(self, count: int) -> Any:
        """0, 1, ..., count - 1."""
        import torch

        return torch.arange(count, device=self.device)

    def generate(self, model: Any) -> list[int]:
        """Greedy tokens of all requests."""
        import torch

        starts = torch.arange(NUM_REQUESTS, device=self.device)[:, None]
        prompt_RT = (starts * 997 + self.ids(PROMPT_LEN) * 31 + 7) % 30000
        hidden_TE = self._forward(model, prompt_RT.flatten(), PROMPT_LEN, PROMPT_LEN)
        token_R = self._next(hidden_TE[PROMPT_LEN - 1 :: PROMPT_LEN])
        self.clock.lap("first_token_s")
        tokens = [token_R]
        for step in range(1, NUM_STEPS):
            token_R = self._next(self._forward(model, token_R, 1, PROMPT_LEN + step))
            tokens.append(token_R)
            if step == 1:
                self.clock.lap("second_token_s")
        return [int(token) for token_R in tokens for token in token_R]

    def time_decode(self, model: Any) -> dict[str, float]:
        """Microseconds per forward of one request at a time: on the host alone, and until the device is done."""
        import torch

        context, ids_T, positions_T = self._batch(self.ids(1) + 5, 1, PROMPT_LEN + NUM_STEPS, num_requests=1)
        host, total = [], []
        wait = torch.cuda.synchronize if self.device.type == "cuda" else (lambda: None)
        with context:
            for _ in range(40):
                wait()
                started = time.perf_counter()
                model(ids_T, positions_T)
                host.append(time.perf_counter() - started)
                wait()
                total.append(time.perf_counter() - started)
        return {"host": round(sorted(host)[20] * 1e6, 1), "total": round(sorted(total)[20] * 1e6, 1)}

    def time_graph(self, model: Any) -> dict[str, Any]:
        """Capture a decode forward of one request, and compare a replay with a plain call."""
        import torch

        context, ids_T, positions_T = self._batch(self.ids(1) + 5, 1, PROMPT_LEN + NUM_STEPS, num_requests=1)
        with context:
            expected_TE = model(ids_T, positions_T).clone()
            torch.cuda.synchronize()
            started = time.perf_counter()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out_TE = model(ids_T, positions_T)
            capture_s = time.perf_counter() - started
        out_TE.zero_()
        graph.replay()
        torch.cuda.synchronize()
        same = bool(torch.equal(out_TE, expected_TE))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(100):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return {"capture_s": round(capture_s, 4), "replay_us": round(begin.elapsed_time(end) * 10, 1), "same": same}

    def _next(self, hidden_RE: Any) -> Any:
        return self.model.compute_logits(hidden_RE).argmax(-1)

    def _forward(self, model: Any, ids_T: Any, query_len: int, seq_len: int) -> Any:
        context, ids_T, positions_T = self._batch(ids_T, query_len, seq_len)
        with context:
            return model(ids_T, positions_T)

    def _batch(self, ids_T: Any, query_len: int, seq_len: int, num_requests: int = NUM_REQUESTS) -> Any:
        """Forward context, token ids and positions of a step that brings ``query_len`` tokens to each request."""
        import numpy as np
        import torch

        from workers.attention.base import BatchGeometry
        from workers.graphs.context import ForwardContext, set_forward_context

        blocks = np.arange(NUM_REQUESTS * self.blocks_per_request, dtype=np.int32).reshape(NUM_REQUESTS, -1)
        blocks = blocks[:num_requests]
        positions = np.tile(np.arange(seq_len - query_len, seq_len), num_requests)
        rows = np.repeat(np.arange(num_requests), query_len)
        slots = blocks[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        starts = np.arange(num_requests + 1, dtype=np.int32) * query_len
        lengths = np.full(num_requests, seq_len, np.int32)

        def on_device(array: Any) -> Any:
            return torch.from_numpy(array.copy()).to(self.device)

        geometry = BatchGeometry(
            num_reqs=num_requests,
            num_tokens=num_requests * query_len,
            max_query_len=query_len,
            max_seq_len=seq_len,
            query_start_loc_cpu=starts,
            seq_lens_cpu=lengths,
            query_start_loc=on_device(starts),
            seq_lens=on_device(lengths),
            block_table_RM=on_device(blocks),
            slot_mapping_T=on_device(slots.astype(np.int64)),
        )
        context = ForwardContext(self.backend, self.backend.build_metadata(geometry), self.kv_caches)
        return set_forward_context(context), ids_T, on_device(positions.astype(np.int64))


if __name__ == "__main__":
    main()
