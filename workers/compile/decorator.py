"""``@support_torch_compile``: a model class declares which dimensions of its arguments change from batch to batch.

Knows annotations only. Imports no compiler, so that model files can use it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar, overload

from torch import nn

from workers.compile.errors import CompileError

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])

_ATTRIBUTE = "__dynamic_arg_dims__"
_TENSOR_ANNOTATIONS = frozenset({"torch.Tensor", "Tensor"})


@overload
def support_torch_compile(cls: ModuleClass) -> ModuleClass: ...


@overload
def support_torch_compile(*, dynamic_arg_dims: Mapping[str, int]) -> Callable[[ModuleClass], ModuleClass]: ...


def support_torch_compile(
    cls: ModuleClass | None = None, *, dynamic_arg_dims: Mapping[str, int] | None = None
) -> ModuleClass | Callable[[ModuleClass], ModuleClass]:
    """Let :func:`workers.compile.compile_model` compile instances of this class.

    Args:
        dynamic_arg_dims: The dimension of each tensor argument of ``forward`` that varies; by default dimension 0
            of every parameter that is annotated as a tensor.

    Raises:
        CompileError: ``forward`` has no such parameter, none that is annotated as a tensor, or one that may be a tensor
            or something else.
    """

    def decorate(target: ModuleClass) -> ModuleClass:
        dims = _inferred(target) if dynamic_arg_dims is None else _checked(target, dynamic_arg_dims)
        setattr(target, _ATTRIBUTE, dims)
        return target

    return decorate if cls is None else decorate(cls)


def dynamic_arg_dims(model: nn.Module | type[nn.Module]) -> dict[str, int]:
    """The dynamic dimension of each tensor argument of a model's ``forward``, in the order of its parameters.

    Raises:
        CompileError: The class is not decorated.
    """
    cls = model if isinstance(model, type) else type(model)
    dims: dict[str, int] | None = getattr(cls, _ATTRIBUTE, None)
    if dims is None:
        raise CompileError(
            f"{cls.__name__} does not declare its dynamic dimensions: decorate it with @support_torch_compile."
        )
    return dict(dims)


def _inferred(cls: type[nn.Module]) -> dict[str, int]:
    parameters = _parameters(cls)
    for name, parameter in parameters.items():
        # An argument that is sometimes absent, or a list, is a decision of the model's author.
        if not _is_tensor(parameter.annotation) and "Tensor" in (text := _text(parameter.annotation)):
            raise CompileError(
                f"{cls.__name__}.forward annotates {name} as {text}, from which no dimension is inferred; pass "
                "dynamic_arg_dims."
            )
    dims = {name: 0 for name, parameter in parameters.items() if _is_tensor(parameter.annotation)}
    if not dims:
        raise CompileError(f"{cls.__name__}.forward annotates no parameter as torch.Tensor; pass dynamic_arg_dims.")
    return dims


def _checked(cls: type[nn.Module], dims: Mapping[str, int]) -> dict[str, int]:
    parameters = _parameters(cls)
    unknown = sorted(dims.keys() - parameters.keys())
    if unknown:
        raise CompileError(
            f"{cls.__name__}.forward has no parameter {', '.join(unknown)}; it has {', '.join(parameters)}."
        )
    return {name: dims[name] for name in parameters if name in dims}


def _parameters(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(cls.forward).parameters)
    parameters.pop("self", None)
    return parameters


def _is_tensor(annotation: object) -> bool:
    return _text(annotation) in _TENSOR_ANNOTATIONS


def _text(annotation: object) -> str:
    """With postponed evaluation an annotation is its source text."""
    if isinstance(annotation, str):
        return annotation
    return f"torch.{annotation.__name__}" if isinstance(annotation, type) else str(annotation)
