"""Models to compile in tests, and random batches that must come out as they do eagerly."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tests.paged import CPU, PagedSession
from tests.tiny_models import VOCAB_SIZE, tiny_checkpoint
from workers.artifacts.library import ArtifactLibrary
from workers.attention.sdpa import SdpaPagedAttention
from workers.compile import support_torch_compile
from workers.compile.model import ATTENTION_OPS, CompiledModel, compile_model
from workers.compile.stitch import KeepRows, WrapPiece
from workers.config import CompilationConfig
from workers.kernels import cpu_ops, linear, reference
from workers.model import decoder
from workers.model.config import ModelConfig
from workers.model.decoder import DecoderForCausalLM
from workers.model.loader import load_model

BLOCK_SIZE = 8
HIDDEN = 8


@functools.cache
def tiny_decoder(name: str, dtype: torch.dtype = torch.float32) -> DecoderForCausalLM:
    """A tiny model of the given variant."""
    folder = tiny_checkpoint(name)
    with torch.inference_mode():
        return load_model(folder, ModelConfig.from_folder(folder), dtype, CPU)


def _linear_as_on_a_gpu(layer: linear.Linear, x_TK: torch.Tensor) -> torch.Tensor:
    y_TN: torch.Tensor = torch.ops.warmgraph.linear(x_TK, layer.weight, layer.bias)
    return y_TN


def _silu_and_mul_as_on_a_gpu(layer: linear.Linear, x_TK: torch.Tensor) -> torch.Tensor:
    if layer.bias is not None:
        return reference.silu_and_mul(layer(x_TK))
    y_TN: torch.Tensor = torch.ops.warmgraph.linear_silu_and_mul(x_TK, layer.weight)
    return y_TN


def use_plain_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have models on the CPU compute in plain torch, as they do on a GPU, so that a compiler sees every operation."""
    monkeypatch.setattr(cpu_ops, "is_available", lambda: False)
    for name in ("rms_norm", "add_rms_norm", "apply_rope"):
        monkeypatch.setattr(decoder, name, getattr(reference, name))
    monkeypatch.setattr(linear.Linear, "forward", _linear_as_on_a_gpu)
    monkeypatch.setattr(linear.Linear, "silu_and_mul", _silu_and_mul_as_on_a_gpu)
    monkeypatch.setattr(decoder, "embedding", torch.nn.functional.embedding)


def plain_decoder(name: str, dtype: torch.dtype = torch.float32) -> DecoderForCausalLM:
    """A tiny model of its own, for :func:`use_plain_forms`."""
    model: DecoderForCausalLM = tiny_decoder.__wrapped__(name, dtype)
    return model


def example_args(num_tokens: int = 8) -> dict[str, torch.Tensor]:
    """What the decoder is traced with."""
    return {"input_ids_T": torch.arange(num_tokens), "positions_T": torch.arange(num_tokens)}


def compile_decoder(
    model: DecoderForCausalLM,
    *,
    library: ArtifactLibrary | None = None,
    wrap_piece: WrapPiece | None = None,
    splitting_ops: Sequence[str] = ATTENTION_OPS,
    **config: Any,
) -> CompiledModel:
    """Compile with a config of these fields."""
    return compile_model(
        model,
        CompilationConfig(**config),
        example_args(),
        splitting_ops=splitting_ops,
        library=library,
        wrap_piece=wrap_piece,
    )


def random_steps(rng: random.Random, num_steps: int = 8) -> Iterator[tuple[dict[str, list[int]], int]]:
    """Chunks by request and a number of padding tokens; the first step and every third bring one token in all."""
    running: list[str] = []
    for step in range(num_steps):
        if step % 3 == 0:
            chunks = {f"single{step}": [rng.randrange(VOCAB_SIZE)]}
            yield chunks, 0
            running += chunks
            continue
        chunks = {key: [rng.randrange(VOCAB_SIZE)] for key in running if rng.random() < 0.7}
        newcomers = {f"r{step}.{index}": rng.randint(2, 12) for index in range(rng.randint(1, 2))}
        chunks |= {key: [rng.randrange(VOCAB_SIZE) for _ in range(length)] for key, length in newcomers.items()}
        running += newcomers
        yield chunks, rng.choice((0, 0, 3))


class _Decoder:
    """A compiled forward with the head of the model that it came from."""

    def __init__(self, model: DecoderForCausalLM, forward: Callable[..., Any]) -> None:
        self.config = model.config
        self.compute_logits = model.compute_logits
        self._forward = forward

    def __call__(self, *args: torch.Tensor) -> Any:
        return self._forward(*args)


def _run(model: DecoderForCausalLM, forward: Callable[..., Any], seed: int) -> list[torch.Tensor]:
    """Logits of every request of random batches, on caches of their own."""
    decoder: Any = _Decoder(model, forward)
    session = PagedSession(decoder, SdpaPagedAttention(model.attention_spec(BLOCK_SIZE), CPU))
    logits = []
    for chunks, num_padding_tokens in random_steps(random.Random(seed)):
        logits += session.step(chunks, num_padding_tokens=num_padding_tokens).values()
    return logits


def assert_equals_eager(model: DecoderForCausalLM, forward: Callable[..., Any], seed: int = 0) -> None:
    """Logits of random batches within 1e-5 of the eager model's."""
    for got, expected in zip(_run(model, forward, seed), _run(model, model, seed), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def assert_within_rounding(
    exact: DecoderForCausalLM, model: DecoderForCausalLM, forward: Callable[..., Any], seed: int = 0
) -> None:
    """Logits of random batches as near to those of the same weights in fp32 as the eager model's are.

    Args:
        exact: In fp32.
        model: In the dtype of ``forward``.
    """
    truth, eager, got = (
        torch.cat(logits) for logits in (_run(exact, exact, seed), _run(model, model, seed), _run(model, forward, seed))
    )
    rounding = (eager - truth).norm()
    assert 0 < rounding < 0.1 * truth.norm()
    assert (got - truth).norm() < 1.3 * rounding


def define_mixing_op() -> None:
    """``test_compile::mix(x, out!, layer)``: an opaque op to split at, ``out = cumsum(x) + layer``."""
    if hasattr(torch.ops.test_compile, "mix"):
        return
    library = torch.library.Library("test_compile", "FRAGMENT")
    library.define("mix(Tensor x, Tensor(a!) out, int layer) -> ()")
    library.define("cube(Tensor x) -> Tensor")
    library.impl("mix", _mix, "CPU")
    library.impl("cube", lambda x: x**3, "CPU")
    library._register_fake("mix", lambda x, out, layer: None)
    library._register_fake("cube", lambda x: torch.empty_like(x))
    _libraries.append(library)


_libraries: list[Any] = []


def _mix(x: torch.Tensor, out: torch.Tensor, layer: int) -> None:
    out.copy_(x.cumsum(0) + layer)


class MixingLayer(nn.Module):
    """A linear layer, a non-linearity, and the opaque op between tokens."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        hidden_TE = torch.tanh(self.linear(x_TE))
        out_TE = torch.empty_like(hidden_TE)
        torch.ops.test_compile.mix(hidden_TE, out_TE, self.layer)
        return x_TE + out_TE


@support_torch_compile
class MixingModel(nn.Module):
    """The smallest model with the structure of a decoder."""

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__()
        define_mixing_op()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(MixingLayer(layer) for layer in range(num_layers))
        self.requires_grad_(False)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_TE = layer(x_TE)
        return x_TE


MIXING_OPS = ("test_compile::mix",)


def mixing_inputs(num_tokens: int = 4, seed: int = 0) -> torch.Tensor:
    """Random ``[T, E]``."""
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def compile_mixing(
    model: MixingModel,
    *,
    library: ArtifactLibrary | None = None,
    wrap_piece: WrapPiece | None = None,
    keep_rows: KeepRows | None = None,
    **config: Any,
) -> CompiledModel:
    """Compile the small model; runs pieces as they are unless the config says otherwise."""
    return compile_model(
        model,
        CompilationConfig(**{"mode": "VLLM_COMPILE", "piece_format": "fx", **config}),
        {"x_TE": mixing_inputs()},
        splitting_ops=MIXING_OPS,
        library=library,
        wrap_piece=wrap_piece,
        keep_rows=keep_rows,
    )
