"""``warmgraph compile``: look at what the compile layer makes of a model.

Traces with made-up weights and prints; what is compiled is never run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from cluster.cli.options import ConfigPath, Overrides
from cluster.cli.output import print_table
from cluster.config import DeploymentConfig
from workers.config import EngineConfig
from workers.modes import CompilationMode

if TYPE_CHECKING:
    from workers.compile.compiler import SplitModel
    from workers.compile.plan import Plan
    from workers.compile.show import PlanSummary

app = typer.Typer(name="compile", help="Look at compiled pieces.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``show`` a sub-command while it is the only one."""


@app.command()
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Which of the config's models, if there are several.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Instead of the config's; 'meta' shows the graph of a GPU, on any machine, without memory."),
    ] = None,
    graph: Annotated[
        Path | None, typer.Option("--graph", help="Also write the graph, its pieces and a picture to this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the pieces of a model, how often each is called, what it holds, and what has been built of it."""
    from workers.compile.show import summarize

    engine = DeploymentConfig.from_file(config, overrides).model_named(model).engine
    split, plan = _split(engine, device)
    summary = summarize(plan)
    if graph is not None:
        _write(graph, split, plan)
    if as_json:
        print(json.dumps(summary.to_dict(), indent=2))
    else:
        _print(summary)
        _say_unless_compiled(engine, device)


def _split(engine: EngineConfig, device_name: str | None) -> tuple[SplitModel, Plan]:
    """The model's pieces, and their plan: the stored one, with its builds, if there is one."""
    import torch

    from workers.artifacts.library import ArtifactLibrary
    from workers.attention.selector import make_backend
    from workers.attention.triton_paged import TritonPagedAttention
    from workers.checkpoint.resolve import resolve_model
    from workers.compile.compilation import PieceCompilation
    from workers.model.config import ModelConfig
    from workers.model.decoder import DecoderForCausalLM
    from workers.model.loader import load_model
    from workers.runner.artifacts import key_of_config
    from workers.runner.device import resolve_device, resolve_dtype

    folder = resolve_model(engine.model)
    model_config = ModelConfig.from_folder(folder)
    is_meta = device_name == "meta"
    device = torch.device("meta") if is_meta else resolve_device(device_name or engine.device)
    dtype = resolve_dtype(engine.dtype, model_config, device)
    if is_meta:
        model = DecoderForCausalLM(model_config, dtype=dtype, device=device, max_model_len=engine.max_model_len)
        splitting_ops = TritonPagedAttention.splitting_ops
    else:
        model = load_model(folder, model_config, dtype, device, "dummy", max_model_len=engine.max_model_len)
        backend = make_backend(engine.attention_backend, model.attention_spec(engine.block_size), device)
        splitting_ops = backend.splitting_ops
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    # Nothing has been built for a device that is not here.
    library = ArtifactLibrary.in_memory() if is_meta else ArtifactLibrary.from_config(engine.artifacts)
    key = key_of_config(engine, torch.device("cpu") if is_meta else device)
    example_args = {"input_ids_T": ids, "positions_T": ids.clone()}
    compilation = PieceCompilation(model, engine.compilation_config, example_args, splitting_ops, library, key)
    split = compilation.split()
    return split, compilation.stored_plan() or split.plan


def _write(folder: Path, split: SplitModel, plan: Plan) -> None:
    """The full graph and every unique piece as text, the stitching as Python, the split as a picture."""
    from workers.compile.show import split_svg
    from workers.compile.stitch import source

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.txt").write_text(split.full_graph.print_readable(print_output=False))
    for key, piece in split.graphs.items():
        (folder / f"piece-{key[:8]}.txt").write_text(piece.code.strip() + "\n")
    (folder / "stitched.py").write_text(source(plan))
    (folder / "split.svg").write_text(split_svg(plan))


def _build_text(build: dict[str, Any]) -> str:
    size = "" if build["size"] is None else f" for {build['size']}"
    return f"{build['format']}{size}: {build['seconds']:.2f} s, {decimal(build['num_bytes'])}"


def _say_unless_compiled(engine: EngineConfig, device_name: str | None) -> None:
    """What was shown is what the compile layer would make of the model; an engine may not ask it to."""
    from workers.runner.device import resolve_device

    is_meta = device_name == "meta"
    device_type = "cuda" if is_meta else resolve_device(device_name or engine.device).type
    mode = engine.compilation_config.resolved_mode(device_type)
    if mode is not CompilationMode.VLLM_COMPILE:
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"An engine of this config does not use them: compilation_config.mode is {mode.name} on {device_type}."
        )


def _print(summary: PlanSummary) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{summary.num_piece_calls} pieces, {len(summary.pieces)} of them unique; {summary.num_weights} weights; "
        f"traced in {summary.trace_seconds:.2f} s"
    )
    table = Table("piece", "calls", "ops", "most frequent", "built", box=None)
    for piece in summary.pieces:
        frequent = ", ".join(f"{count} {name}" for name, count in list(piece.ops.items())[:4])
        builds = [_build_text(build) for build in piece.builds]
        table.add_row(piece.key[:8], str(piece.num_calls), str(piece.num_ops), frequent, "\n".join(builds) or "-")
    print_table(table)
    for name, count in summary.split_ops.items():
        console.print(f"between pieces: {name}, {count} calls")
    for name, count in summary.passes.items():
        console.print(f"passes: {name}: {count} matches")
