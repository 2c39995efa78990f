"""Weights arrive complete, once, and in place; a checkpoint that does not fit is refused with its reason."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paged import CPU
from tests.tiny_models import ARCHITECTURE_NAMES, save_tiny_model, tiny_checkpoint
from workers.errors import ModelError
from workers.kernels.linear import Linear
from workers.model.config import ModelConfig
from workers.model.decoder import DecoderForCausalLM
from workers.model.layout import checkpoint_layout
from workers.model.loader import load_model

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1"


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> DecoderForCausalLM:
    return load_model(folder, ModelConfig.from_folder(folder), dtype, CPU, **options)  # type: ignore[arg-type]


def edited(tmp_path: Path, edit: Callable[[Tensors], object], name: str = "llama") -> Path:
    """A copy of a tiny checkpoint whose tensors went through ``edit``."""
    folder = tmp_path / "edited"
    shutil.copytree(tiny_checkpoint(name), folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def no_finalize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps weights as they were loaded."""
    monkeypatch.setattr(Linear, "finalize", lambda self: None)


@pytest.mark.usefixtures("no_finalize")
@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
def test_every_tensor_lands_in_its_rows(name: str) -> None:
    model = load(tiny_checkpoint(name))
    parameters = dict(model.named_parameters())
    stored = load_file(tiny_checkpoint(name) / "model.safetensors")
    layout = checkpoint_layout(model, model.config)
    assert layout.keys() == stored.keys()
    for key, destination in layout.items():
        rows = parameters[destination.parameter][destination.start : destination.start + destination.shape[0]]
        assert torch.equal(rows, stored[key]), key
    num_values = sum(parameter.numel() for parameter in parameters.values())
    assert num_values == sum(tensor.numel() for tensor in stored.values())


def test_finalize_runs_once_on_every_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    finalized: list[Linear] = []
    monkeypatch.setattr(Linear, "finalize", lambda self: finalized.append(self))
    model = load(tiny_checkpoint("llama"))
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(linears) == 3 * 4 + 1
    assert finalized == linears


@pytest.mark.usefixtures("no_finalize")
def test_tied_embeddings_share_memory() -> None:
    model = load(tiny_checkpoint("llama-tied"))
    assert model.lm_head is model.model.embed_tokens
    assert [spec.name for spec in model.parameter_specs].count("lm_head.weight") == 0


def test_parameter_specs_describe_the_model_as_loaded() -> None:
    specs = {spec.name: spec for spec in load(tiny_checkpoint("qwen3"), torch.bfloat16).parameter_specs}
    qkv = specs[f"{LAYER}.self_attn.qkv_proj.weight"]
    assert (qkv.shape, qkv.dtype) == ((4 * 32 + 2 * 4 * 32, 64), torch.bfloat16)
    assert specs[f"{LAYER}.mlp.gate_up_proj.weight"].shape == (2 * 96, 64)


@pytest.mark.usefixtures("no_finalize")
def test_sharded_checkpoint_equals_the_single_file(tmp_path: Path) -> None:
    sharded = save_tiny_model("qwen2", tmp_path, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    single = dict(load(tiny_checkpoint("qwen2")).named_parameters())
    for name, parameter in load(sharded).named_parameters():
        assert torch.equal(parameter, single[name])


def test_progress_runs_from_zero_to_the_stored_size() -> None:
    calls: list[tuple[int, int]] = []
    load(tiny_checkpoint("llama"), progress=lambda done, total: calls.append((done, total)))
    stored = load_file(tiny_checkpoint("llama") / "model.safetensors")
    total = sum(tensor.nbytes for tensor in stored.values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_old_inverse_frequencies_are_ignored(tmp_path: Path) -> None:
    load(edited(tmp_path, lambda t: t.update({f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.ones(8)})))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.self_attn.k_proj.weight"), f"lacks {LAYER}.self_attn.k_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (lambda t: t.update({f"{LAYER}.mlp.up_proj.bias": torch.ones(96)}), "has model.layers.1.mlp.up_proj.bias"),
        (lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(64)}), "layers.3"),
        (
            lambda t: t.update({f"{LAYER}.self_attn.v_proj.weight": torch.ones(64, 64)}),
            r"v_proj.weight in model.safetensors has shape \[64, 64\].*\[32, 64\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.mlp.down_proj.weight": torch.ones(64, 96, dtype=torch.int8)}),
            "stored as I8",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    edit: Callable[[Tensors], object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        load(edited(tmp_path, edit))


def test_nothing_is_allocated_for_a_bad_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = edited(tmp_path, lambda t: t.pop("lm_head.weight"))
    monkeypatch.setattr("workers.model.loader._allocate", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ModelError):
        load(folder)


def test_a_stored_head_must_repeat_tied_embeddings(tmp_path: Path) -> None:
    def repeat(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    load(edited(tmp_path, repeat, "llama-tied"))
    shutil.rmtree(tmp_path / "edited")
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        load(edited(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(512, 64)}), "llama-tied"))


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    shutil.copy(shards[0], folder / "model-copy.safetensors")
    content = json.loads(index.read_text())
    content["weight_map"]["again"] = "model-copy.safetensors"
    whole = index.read_text()
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="is in model-00001-of"):
        load(folder)
    content["weight_map"]["again"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="not a file of the folder"):
        load(folder)
    index.write_text(whole)
    shards[0].write_bytes(shards[0].read_bytes()[:-8])
    with pytest.raises(ModelError, match="cannot be read"):
        load(folder)
    shards[0].unlink()
    with pytest.raises(ModelError, match="is missing"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match="not an index"):
        load(folder)
    index.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(folder)


def test_a_folder_of_pickles_says_what_to_do(tmp_path: Path) -> None:
    shutil.copy(tiny_checkpoint("llama") / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"convert pytorch_model\.bin"):
        load(tmp_path)


@pytest.mark.usefixtures("no_finalize")
def test_dummy_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    shutil.copy(tiny_checkpoint("qwen3-bias") / "config.json", tmp_path)
    first, again, other = (load(tmp_path, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    deeper_config = dataclasses.replace(first.config, num_hidden_layers=5)
    deeper = load_model(tmp_path, deeper_config, torch.float32, CPU, "dummy", 1)
    deeper_parameters, other_parameters = dict(deeper.named_parameters()), dict(other.named_parameters())
    for (name, parameter), same in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, same)
        assert torch.equal(parameter, deeper_parameters[name])
        if parameter.dim() > 1:
            assert not torch.equal(parameter, other_parameters[name])
            assert float(parameter.std()) == pytest.approx(first.config.initializer_range, rel=0.1)
            assert abs(float(parameter.mean())) < 0.01
    parameters = dict(first.named_parameters())
    assert torch.equal(parameters[f"{LAYER}.self_attn.qkv_proj.bias"], torch.zeros(4 * 16 + 2 * 2 * 16))
    assert torch.equal(parameters[f"{LAYER}.self_attn.q_norm.weight"], torch.ones(16))


def test_nothing_that_takes_long_to_import_is_needed() -> None:
    code = """
import sys
from pathlib import Path
import torch
import workers.engine.engine
from workers.attention.sdpa import SdpaPagedAttention
from workers.graphs.context import ForwardContext, set_forward_context
from workers.model.config import ModelConfig
from workers.model.loader import load_model
folder, cpu = Path(sys.argv[1]), torch.device("cpu")
with torch.inference_mode():
    model = load_model(folder, ModelConfig.from_folder(folder), torch.float32, cpu)
    attention = SdpaPagedAttention(model.attention_spec(16), cpu)
    with set_forward_context(ForwardContext(attention, None, ())):
        model(torch.zeros(4, dtype=torch.int64), torch.arange(4))
assert not {"sympy", "transformers", "torch._dynamo", "torch._inductor"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code, str(tiny_checkpoint("llama"))], check=True)
