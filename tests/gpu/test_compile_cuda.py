"""Compiled pieces on a CUDA device: right, captured in graphs, and loaded by a fresh process that compiles nothing.

AOTInductor pieces take a C++ compiler a minute or more; ``-k "not aoti"`` leaves them out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paged import PagedSession
from workers.artifacts.library import ArtifactLibrary
from workers.attention.selector import make_backend
from workers.compile import PieceInfo, compile_model
from workers.compile.key import ATTENTION_OPS
from workers.config import ArtifactConfig, CompilationConfig
from workers.graphs.context import ForwardContext, set_forward_context
from workers.model.config import ModelConfig
from workers.model.decoder import DecoderForCausalLM
from workers.model.loader import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CUDA = torch.device("cuda")
NUM_LAYERS = 3
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}

#: A replica's start: load what is in the store, run a batch, say what was compiled and imported.
WARM_PROCESS = """
import json, sys
import torch
from pathlib import Path
from tests.gpu.test_compile_cuda import CUDA, batch, make_model, run
from workers.artifacts.library import ArtifactLibrary
from workers.compile import compile_model
from workers.compile.counters import compiler_activity
from workers.config import ArtifactConfig, CompilationConfig

folder, piece_format = Path(sys.argv[1]), sys.argv[2]
with torch.inference_mode():
    model = make_model(folder)
    config = CompilationConfig(mode="VLLM_COMPILE", piece_format=piece_format)
    library = ArtifactLibrary.from_config(ArtifactConfig(), folder / "store")
    compiled = compile_model(model, config, batch(8), library=library)
    out = run(compiled, 5)
print(json.dumps({
    "is_warm": compiled.report.is_warm,
    "activity": compiler_activity(),
    "compilers": [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules],
    "sum": out.float().sum().item(),
}))
"""


def make_model(folder: Path) -> DecoderForCausalLM:
    """A small Qwen3 with dummy weights in bf16."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return load_model(folder, ModelConfig.from_folder(folder), torch.bfloat16, CUDA, "dummy")


def batch(num_tokens: int) -> dict[str, torch.Tensor]:
    """Token ids and positions."""
    ids = torch.arange(num_tokens, device=CUDA)
    return {"input_ids_T": ids * 37 % CONFIG["vocab_size"], "positions_T": ids}


class Attention:
    """Stands for attention: the mean of q over its head, broadcast, so that what reaches the next piece matters."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Any, metadata: Any, out: torch.Tensor
    ) -> None:
        out.copy_(q * k.float().mean().to(q.dtype) + v.mean(dim=1, keepdim=True))


def context() -> ForwardContext:
    """Of a batch with attention, and without caches."""
    caches: Any = [None] * NUM_LAYERS
    return ForwardContext(Attention(), object(), caches)


@torch.inference_mode()
def run(model: Any, num_tokens: int) -> torch.Tensor:
    """Hidden states of a batch."""
    with set_forward_context(context()):
        out: torch.Tensor = model(*batch(num_tokens).values())
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compile")


@pytest.fixture(scope="module")
def model(folder: Path) -> DecoderForCausalLM:
    with torch.inference_mode():
        return make_model(folder)


def compiled_model(
    model: DecoderForCausalLM,
    folder: Path,
    wrap_piece: Any = None,
    splitting_ops: Sequence[str] = ATTENTION_OPS,
    **config: Any,
) -> Any:
    with torch.inference_mode():
        return compile_model(
            model,
            CompilationConfig(**config),
            batch(8),
            splitting_ops=splitting_ops,
            library=ArtifactLibrary.from_config(ArtifactConfig(), folder / "store"),
            wrap_piece=wrap_piece,
        )


MODES = [
    {"mode": "STOCK_TORCH_COMPILE"},
    {"mode": "DYNAMO_TRACE_ONCE"},
    {"mode": "VLLM_COMPILE", "piece_format": "fx"},
    {"mode": "VLLM_COMPILE", "piece_format": "standalone", "compile_sizes": [1, 4]},
    {"mode": "VLLM_COMPILE", "piece_format": "aoti", "compile_sizes": [1]},
]


@pytest.mark.parametrize("config", MODES, ids=lambda config: config.get("piece_format", config["mode"]))
def test_every_mode_equals_eager_within_rounding(
    config: dict[str, Any], model: DecoderForCausalLM, folder: Path
) -> None:
    compiled = compiled_model(model, folder, **config)
    for num_tokens in (1, 2, 4, 5, 33, 300):
        torch.testing.assert_close(run(compiled, num_tokens), run(model, num_tokens), atol=6e-2, rtol=5e-2)


def test_passes_match_every_layer(model: DecoderForCausalLM, folder: Path) -> None:
    passes = compiled_model(model, folder, mode="VLLM_COMPILE", piece_format="fx").report.passes
    assert (passes["rope_kv_write"], passes["qk_rope"]) == (0, NUM_LAYERS)


def test_inductor_makes_one_kernel_of_residual_and_norm(
    model: DecoderForCausalLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass is needed for it while products are opaque: all that lies between two of them is one kernel."""
    backend = make_backend("triton", model.attention_spec(16), CUDA)
    compiled = compiled_model(
        model, folder, None, backend.splitting_ops, mode="VLLM_COMPILE", piece_format="standalone"
    )
    session = PagedSession(model, backend, device=CUDA)
    monkeypatch.setattr(model, "forward", compiled)
    session.step({"a": [*range(40)]})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        session.step({"b": [*range(40)]})
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events() if event.name.startswith("triton_")]
    assert len(names) == 1 + 2 * NUM_LAYERS, names  # two norms in every layer, and the last one


def test_attention_rotates_by_itself(model: DecoderForCausalLM, folder: Path) -> None:
    """With the backend of a GPU: the rotation is part of its op, and the logits stay those of eager."""
    backend = make_backend("triton", model.attention_spec(16), CUDA)
    compiled = compiled_model(
        model, folder, None, backend.splitting_ops, mode="VLLM_COMPILE", piece_format="standalone"
    )
    passes = compiled.report.passes
    assert (passes["rope_kv_write"], passes["qk_rope"]) == (NUM_LAYERS, 0)
    sessions = [PagedSession(model, backend, device=CUDA) for _ in range(2)]
    for chunks in (
        {"a": [*range(40)], "b": [9]},
        {"a": [2], "b": [5]},
        {"a": [6], "b": [5, 8, 4], "c": [3]},
        {"c": [1]},
    ):
        expected = sessions[0].step(chunks)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(model, "forward", compiled)
            got = sessions[1].step(chunks)
        for key in chunks:
            torch.testing.assert_close(got[key], expected[key], atol=6e-2, rtol=5e-2)


@pytest.mark.parametrize("piece_format", ["standalone", "aoti"])
def test_pieces_can_be_captured(piece_format: str, model: DecoderForCausalLM, folder: Path) -> None:
    compiled = compiled_model(model, folder, mode="VLLM_COMPILE", piece_format=piece_format)
    expected = run(compiled, 4).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    args = list(batch(4).values())
    with torch.inference_mode(), set_forward_context(context()), torch.cuda.graph(graph):
        out = compiled(*args)
    with torch.inference_mode():
        out.zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("piece_format", ["standalone", "aoti"])
def test_each_piece_is_one_graph(piece_format: str, model: DecoderForCausalLM, folder: Path) -> None:
    """Pieces captured one by one, attention between them run eagerly."""
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def wrap(piece: Any, info: PieceInfo) -> Any:
        def wrapped(*args: torch.Tensor) -> Any:
            if info.index not in graphs:
                piece(*args)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    outputs = piece(*args)
                graphs[info.index] = (graph, outputs)
            graph, outputs = graphs[info.index]
            graph.replay()
            return outputs

        return wrapped

    compiled = compiled_model(model, folder, wrap, mode="VLLM_COMPILE", piece_format=piece_format)
    args = batch(4)
    with torch.inference_mode(), set_forward_context(context()):
        first = compiled(*args.values()).clone()
        second = compiled(*args.values()).clone()
        expected = model(*args.values())
    assert len(graphs) == NUM_LAYERS + 1
    assert torch.equal(first, second)
    torch.testing.assert_close(second, expected, atol=6e-2, rtol=5e-2)


@pytest.mark.parametrize("piece_format", ["standalone", "aoti"])
def test_a_fresh_process_compiles_nothing(
    piece_format: str, model: DecoderForCausalLM, folder: Path, tmp_path: Path
) -> None:
    cold = compiled_model(model, folder, mode="VLLM_COMPILE", piece_format=piece_format)
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    process = subprocess.run(
        [sys.executable, "-c", WARM_PROCESS, str(folder), piece_format],
        env={**os.environ, **caches},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["is_warm"]
    assert report["activity"] == {"dynamo_graphs": 0, "aot_graphs": 0, "inductor_graphs": 0}
    if piece_format == "aoti":
        # Inductor's kernels are part of the package; what is left are our own, which an engine's bundle brings along.
        assert not list((tmp_path / "triton").rglob("triton_*.cubin"))
        assert report["compilers"] == []
    assert report["sum"] == pytest.approx(run(cold, 5).float().sum().item(), rel=1e-3)
