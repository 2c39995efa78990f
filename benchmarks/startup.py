"""Process start to ready: cold, warm from a remote store, warm from local disk, after SIGKILL, and of a second replica.

    python -m benchmarks.startup --shape llama-1b                       # on a GPU
    python -m benchmarks.startup --shape llama-1b --engine vllm         # the rival, on the same machine
    python -m benchmarks.startup --shape smollm2-135m --device cpu --piece-format aoti
    python -m benchmarks.startup --shape llama-1b --phases scale-up     # needs Ray

Every start is a process of its own, with random weights, that makes an engine and one token. ``cold`` has empty stores
and compiler caches; ``warm-remote`` finds the bundle in a store that this node has never read from, and nothing else;
``warm-local`` starts again on the same node; ``after-sigkill`` is the start after a serving process was killed;
``scale-up`` compares a second replica under Ray from a spare process with one from a new process. Ends in one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_PHASES = ("cold", "warm-remote", "warm-local", "after-sigkill", "scale-up")
#: Printed by a child before its JSON; what else libraries print does not matter.
_MARK = "startup-result "
#: Before a line that is to be shown at once.
_PROGRESS = "startup-progress "
#: Of the device's memory, for each of three replicas beside one another.
_SHARE = 0.3


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("warmgraph", "vllm"), default="warmgraph")
    parser.add_argument("--shape", default="llama-1b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--phases", nargs="+", choices=_PHASES, default=list(_PHASES[:4]))
    parser.add_argument("--repeats", type=int, default=1, help="of the warm phases")
    parser.add_argument("--piece-format", default="auto", choices=("auto", "fx", "standalone", "aoti"))
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--builds-ahead", action="store_true", help="run `warm` after the cold start: every format")
    parser.add_argument("--self-check", choices=("node", "off"), default="node")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(args)
        return
    with tempfile.TemporaryDirectory(prefix="startup-", ignore_cleanup_errors=True) as folder:
        args.folder = Path(folder)
        rows = _vllm_rows(args) if args.engine == "vllm" else _rows(args)
    print(json.dumps(_report(args, rows)), flush=True)


def _rows(args: argparse.Namespace) -> dict[str, Any]:
    """Every phase asked for; those that need a warm store have one made by a cold start."""
    rows: dict[str, Any] = {}
    _note("cold", rows, _start(args, "node-a", "start"))
    if args.builds_ahead:
        _note("builds-ahead", rows, _start(args, "node-a", "warm"))
    if "warm-remote" in args.phases:
        for number in range(args.repeats):
            _note(f"warm-remote-{number}", rows, _start(args, f"node-b{number}", "start"))
    if "warm-local" in args.phases:
        for number in range(args.repeats):
            _note(f"warm-local-{number}", rows, _start(args, "node-a", "start"))
    if "after-sigkill" in args.phases:
        killed = _start(args, "node-a", "serve")
        os.kill(killed["pid"], signal.SIGKILL)
        _note("after-sigkill", rows, _start(args, "node-a", "start"))
    if "scale-up" in args.phases:
        _note("scale-up", rows, _start(args, "node-a", "scale-up"))
    return rows


def _vllm_rows(args: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    _note("cold", rows, _start(args, "node-a", "vllm"))
    for number in range(args.repeats):
        _note(f"warm-local-{number}", rows, _start(args, "node-a", "vllm"))
    return rows


def _note(name: str, rows: dict[str, Any], row: dict[str, Any]) -> None:
    rows[name] = row
    print(f"{name}: {json.dumps({key: value for key, value in row.items() if key != 'phases'})}", file=sys.stderr)


def _start(args: argparse.Namespace, node: str, child: str) -> dict[str, Any]:
    """One process on one node, that is, with the caches of that node."""
    home = args.folder / node
    # Where Triton's kernels lie is part of what is measured: an engine of ours keeps them with its artifacts.
    caches = {"WARMGRAPH_ARTIFACTS": "artifacts", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    if child == "vllm":
        caches = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    environment = os.environ | {name: str(home / folder) for name, folder in caches.items()}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = [sys.executable, "-m", "benchmarks.startup", "--child", child, "--folder", str(args.folder)]
    for name in ("shape", "device", "piece_format", "max_num_seqs", "max_model_len", "self_check"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    log = home.with_suffix(".log")
    started = time.perf_counter()
    with log.open("ab") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_MARK):
                ready = time.perf_counter() - started
                break
            if line.startswith(_PROGRESS):
                print(
                    f"{time.perf_counter() - started:6.1f} s  {line.removeprefix(_PROGRESS)}", end="", file=sys.stderr
                )
        else:
            sys.stderr.write(log.read_text(errors="replace")[-4000:])
            raise SystemExit(f"{child} on {node} ended with status {process.wait()}")
    row: dict[str, Any] = {"process_to_first_token_s": round(ready, 2), **json.loads(line.removeprefix(_MARK))}
    if child != "serve":
        process.communicate()
    return row


def _tell(row: dict[str, Any]) -> None:
    usage = os.times()
    print(_MARK + json.dumps({"cpu_s": round(usage.user + usage.system, 2), **row}), flush=True)


def _progress(text: str) -> None:
    print(f"{_PROGRESS}{text}", flush=True)


def _child(args: argparse.Namespace) -> None:
    """What one process does."""
    if args.child == "vllm":
        _start_vllm(args)
    elif args.child == "scale-up":
        _scale_up(args)
    elif args.child == "warm":
        from workers.config import EngineConfig
        from workers.engine.warm import warm

        report = warm(EngineConfig.create(**_options(args)))
        _tell({"formats": {row.name: row.seconds for row in report.formats}, "seconds": report.seconds})
    else:
        _start_engine(args)
        if args.child == "serve":
            time.sleep(600)  # until it is killed


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of an engine."""
    model = args.folder / args.shape
    if not model.exists():
        from benchmarks.shapes import shape_folder

        shutil.move(shape_folder(args.shape), model)
    return {
        "model": str(model),
        "dtype": "bfloat16",
        "device": args.device,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        **({"max_num_batched_tokens": 512} if args.device == "cpu" else {}),
        "compilation_config": {"mode": "VLLM_COMPILE", "piece_format": args.piece_format},
        # One user's nodes with one key. "Remote" is another folder on the same disk: that a node fetches, verifies and
        # tries what it finds is measured, a network is not.
        "artifacts": {"store": str(args.folder / "remote"), "trust": "none", "self_check": args.self_check},
    }


def _start_engine(args: argparse.Namespace) -> None:
    from workers import LLM, SamplingParams

    llm = LLM(**_options(args))
    prompt = {"prompt_token_ids": list(range(1, 129))}
    llm.generate(prompt, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    report = llm.engine.startup_report()
    names = dict.fromkeys(phase.name for phase in report.phases if not phase.name.startswith("piece "))
    _tell(
        {
            "pid": os.getpid(),
            "ready_s": report.ready_s,
            "first_token_s": report.first_token_s,
            "phases": {name: round(report.seconds(name), 3) for name in names},
            "is_warm": [lookup.is_hit for lookup in report.lookups],
            "saved_s": round(report.saved_s, 2),
            "compiler_imported": "torch._inductor.compile_fx" in sys.modules,
        }
    )


def _start_vllm(args: argparse.Namespace) -> None:
    from vllm import LLM, SamplingParams  # the rival; not a dependency

    options = _options(args)
    wanted = ("model", "dtype", "load_format", "skip_tokenizer_init", "max_model_len", "max_num_seqs")
    llm = LLM(**{name: options[name] for name in wanted})
    ready = time.time()
    prompt = {"prompt_token_ids": list(range(1, 129))}
    llm.generate(prompt, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    _tell({"pid": os.getpid(), "first_generate_s": round(time.time() - ready, 2)})


def _scale_up(args: argparse.Namespace) -> None:
    """Replicas as Ray actors: the first, then one from a new process and one from a spare process."""
    from cluster.environment import apply_process_environment

    apply_process_environment()
    import ray

    from cluster.serving.spare import has_spare, keep_spare

    with tempfile.TemporaryDirectory(prefix="wg-", ignore_cleanup_errors=True) as ray_dir:
        num_gpus = 1 if args.device != "cpu" else 0
        _progress("starting Ray")
        ray.init(num_cpus=4, num_gpus=num_gpus, include_dashboard=False, log_to_driver=False, _temp_dir=ray_dir)
        options = _options(args) | {"gpu_memory_utilization": _SHARE}

        class Replica:
            """An engine in a process of its own."""

            def __init__(self) -> None:
                from workers.config import EngineConfig
                from workers.engine.start import start_engine
                from workers.startup.account import StartupAccount

                self._engine = start_engine(EngineConfig.create(**options), StartupAccount())

            def report(self) -> dict[str, Any]:
                return self._engine.startup_report().to_dict()

            def keep_spare(self) -> None:
                keep_spare()

            def has_spare(self) -> bool:
                return has_spare()

        actor: Any = ray.remote(Replica).options(num_cpus=0, num_gpus=num_gpus / 3)
        rows, replicas = {}, []
        _progress("taking the processes that Ray begins with")
        idle = [ray.remote(_Idle).options(num_cpus=0).remote() for _ in range(4)]
        ray.get([other.pid.remote() for other in idle])  # takes the processes that Ray has in store at first
        for name in ("first", "new process", "spare process"):
            if name == "spare process":
                _progress("waiting for a spare process")
                ray.get(replicas[0].keep_spare.remote())
                _wait_for_spare(replicas[0])
            _progress(f"replica: {name}")
            started = time.perf_counter()
            replicas.append(actor.remote())
            report = ray.get(replicas[-1].report.remote())
            phases = {phase["name"]: round(phase["end_s"] - phase["start_s"], 3) for phase in report["phases"]}
            seconds = round(time.perf_counter() - started, 2)
            rows[name] = {"wanted_to_ready_s": seconds, "own_start_s": report["ready_s"], "phases": phases}
        ray.shutdown()
    _tell({"rows": rows})


class _Idle:
    """An actor that takes a process."""

    def pid(self) -> int:
        """That it is there."""
        return os.getpid()


def _wait_for_spare(replica: Any) -> None:
    """Until the spare process has done its imports and waits."""
    import ray

    deadline = time.monotonic() + 120
    while not ray.get(replica.has_spare.remote()):
        if time.monotonic() > deadline:
            raise SystemExit("no spare process came up")
        time.sleep(0.5)
    time.sleep(15)


def _report(args: argparse.Namespace, rows: dict[str, Any]) -> dict[str, Any]:
    import torch

    has_gpu = torch.cuda.is_available() and args.device != "cpu"
    return {
        "benchmark": "startup",
        "engine": args.engine,
        "shape": args.shape,
        "piece_format": args.piece_format,
        "device": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
