"""The decoder suits a compiler: one graph for every number of tokens, split points at attention only."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.paged import CPU
from tests.tiny_models import tiny_checkpoint
from workers.attention.sdpa import SdpaPagedAttention
from workers.graphs.context import ForwardContext, set_forward_context
from workers.model.config import ModelConfig
from workers.model.loader import load_model


@pytest.mark.parametrize(("name", "mark"), [("llama", "unbacked"), ("qwen3", "unbacked"), ("qwen2", "dynamic")])
def test_one_graph_serves_every_batch_size(name: str, mark: str) -> None:
    folder = tiny_checkpoint(name)
    model = load_model(folder, ModelConfig.from_folder(folder), torch.float32, CPU)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    context = ForwardContext(SdpaPagedAttention(model.attention_spec(8), CPU), None, [])
    mark_dimension = getattr(torch._dynamo.decorators, f"mark_{mark}")
    # A dimension marked dynamic is specialised to 1 all the same.
    for num_tokens in (8, 27, 2) if mark == "dynamic" else (8, 27, 2, 1):
        inputs = torch.arange(num_tokens), torch.arange(num_tokens)
        if not graphs:
            for tensor in inputs:
                mark_dimension(tensor, 0)
        with torch.inference_mode(), set_forward_context(context):
            torch.testing.assert_close(compiled(*inputs), model(*inputs))
    assert len(graphs) == 1
    splits = [node for node in graphs[0].graph.nodes if node.target is torch.ops.warmgraph.attention]
    splits += [node for node in graphs[0].graph.nodes if node.target is torch.ops.warmgraph.attention.default]
    assert [node.args[-1] for node in splits] == [0, 1, 2]


def test_building_and_running_a_model_imports_no_compiler() -> None:
    code = f"""
import sys, torch
from workers.attention.selector import make_backend
from workers.graphs.context import ForwardContext, set_forward_context
from workers.model.config import ModelConfig
from workers.model.loader import load_model
cpu = torch.device("cpu")
model = load_model("x", ModelConfig.from_folder({str(tiny_checkpoint("llama"))!r}), torch.float32, cpu, "dummy")
backend = make_backend("sdpa", model.attention_spec(16), cpu)
with torch.inference_mode(), set_forward_context(ForwardContext(backend, None, [])):
    model.compute_logits(model(torch.zeros(3, dtype=torch.int64), torch.arange(3)))
compilers = [name for name in ("torch._dynamo", "torch._inductor", "transformers") if name in sys.modules]
assert not compilers, compilers
"""
    subprocess.run([sys.executable, "-c", code], check=True)
