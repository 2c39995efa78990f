"""What a model class declares, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.compile import compile_model, support_torch_compile
from workers.compile.decorator import dynamic_arg_dims
from workers.compile.errors import CompileError
from workers.config import CompilationConfig
from workers.model.decoder import DecoderForCausalLM


def test_dimensions_come_from_the_annotations() -> None:
    @support_torch_compile
    class Model(nn.Module):
        def forward(self, ids: torch.Tensor, scale: float, positions: torch.Tensor) -> torch.Tensor:
            return ids

    assert dynamic_arg_dims(Model()) == {"ids": 0, "positions": 0}


def test_dimensions_can_be_given() -> None:
    @support_torch_compile(dynamic_arg_dims={"positions": 1, "ids": 0})
    class Model(nn.Module):
        def forward(self, ids, positions):  # type: ignore[no-untyped-def]
            return ids

    assert dynamic_arg_dims(Model()) == {"ids": 0, "positions": 1}


def test_the_decoder_is_decorated() -> None:
    assert DecoderForCausalLM.__dynamic_arg_dims__ == {"input_ids_T": 0, "positions_T": 0}


def test_a_class_without_tensor_annotations_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, ids):  # type: ignore[no-untyped-def]
            return ids

    with pytest.raises(CompileError, match=r"Model\.forward annotates no parameter"):
        support_torch_compile(Model)


@pytest.mark.parametrize("annotation", ["torch.Tensor | None", torch.Tensor | None, "list[torch.Tensor]"])
def test_what_may_be_a_tensor_is_not_guessed(annotation: object) -> None:
    class Model(nn.Module):
        def forward(self, ids, bias):  # type: ignore[no-untyped-def]
            return ids

    Model.forward.__annotations__.update(ids=torch.Tensor, bias=annotation)
    with pytest.raises(CompileError, match=r"Model\.forward annotates bias as .*Tensor.*; pass dynamic_arg_dims"):
        support_torch_compile(Model)


def test_an_unknown_argument_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids

    with pytest.raises(CompileError, match="no parameter positions; it has ids"):
        support_torch_compile(dynamic_arg_dims={"positions": 0})(Model)


def test_an_undecorated_class_is_not_compiled() -> None:
    config = CompilationConfig(mode="VLLM_COMPILE", piece_format="fx")
    with pytest.raises(CompileError, match="Linear does not declare its dynamic dimensions"):
        compile_model(nn.Linear(2, 2), config, {"input": torch.ones(2, 2)})
