"""What a piece gives for fixed inputs: recorded by running its graph eagerly, compared with what compiled code gives.

Inputs are made from a seed and the piece's own signature, so only their shapes are kept; of the outputs, a few values
and their scale. Enough to tell right from wrong, not to the last bit: bits may differ between hosts of one key.

Knows tensors and pieces as callables; nothing of bundles or processes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import fx

from workers.compile.stitch import LoadedPiece

logger = logging.getLogger(__name__)

#: Tokens of the batch with which pieces for every size are tried.
PROBE_TOKENS = 2

#: Operations whose result is the memory of their first argument.
_VIEWS = frozenset({"view", "reshape", "getitem", "unflatten", "flatten", "unsqueeze", "squeeze", "transpose"})

_SEED = 20261125
_NUM_SAMPLES = 16

#: Largest difference, relative to the values' scale: the compiled piece may round at other places than eager code.
_TOLERANCE = {"torch.float32": 1e-3, "torch.float64": 1e-6}
_LOW_PRECISION_TOLERANCE = 0.08


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """A tensor to make."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """A tensor that came out.

    Attributes:
        samples: Its first values.
        scale: Mean absolute value of all.
    """

    dtype: str
    shape: tuple[int, ...]
    samples: tuple[float, ...]
    scale: float


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """A piece with one number of tokens.

    Attributes:
        outputs: None where running the piece alone is not possible. None for a result that the piece only allocates,
            for an op after it to write to.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[Output | None, ...] | None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """From what :func:`record_probes` wrote."""
        inputs = tuple(Input(str(dtype), tuple(shape), tuple(stride)) for dtype, shape, stride in fields["inputs"])
        outputs = fields["outputs"]
        if outputs is None:
            return cls(inputs, None)
        return cls(inputs, tuple(None if output is None else _output(*output) for output in outputs))


def record_probes(graphs: Mapping[str, fx.GraphModule], size: int | None) -> bytes:
    """Run every piece eagerly and write down what it gives, as JSON by piece.

    Args:
        size: Of the batch; None takes :data:`PROBE_TOKENS`.
    """
    probes = {key: dataclasses.astuple(_record(graph, size)) for key, graph in graphs.items()}
    named = {key: {"inputs": inputs, "outputs": outputs} for key, (inputs, outputs) in probes.items()}
    return json.dumps(named, sort_keys=True).encode()


def read_probes(data: bytes) -> dict[str, Probe]:
    """What :func:`record_probes` wrote, by piece."""
    return {key: Probe.from_json(fields) for key, fields in json.loads(data).items()}


def make_inputs(inputs: Sequence[Input], device: torch.device) -> list[torch.Tensor]:
    """The same values in every process on the same kind of device. Integers are 0 and 1, which index every table."""
    generator = torch.Generator(device).manual_seed(_SEED)
    tensors = []
    for spec in inputs:
        dtype: torch.dtype = getattr(torch, spec.dtype.removeprefix("torch."))
        tensor = torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device=device)
        if dtype.is_floating_point:
            # Such that products over the last dimension keep their scale.
            tensor.uniform_(-1, 1, generator=generator).mul_(math.sqrt(3 / max(spec.shape[-1] if spec.shape else 1, 1)))
        else:
            tensor.copy_((torch.arange(tensor.numel(), device=device) % 2).view(spec.shape))
        tensors.append(tensor)
    return tensors


def find_problem(expected: Probe, outputs: Sequence[torch.Tensor]) -> str | None:
    """What is wrong with the outputs of a compiled piece, or None."""
    assert expected.outputs is not None
    if len(outputs) != len(expected.outputs):
        return f"{len(outputs)} results instead of {len(expected.outputs)}"
    for index, (want, tensor) in enumerate(zip(expected.outputs, outputs, strict=True)):
        if want is None:
            continue
        got = _describe(tensor)
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            return f"result {index} is {got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
        limit = _TOLERANCE.get(want.dtype, _LOW_PRECISION_TOLERANCE) * (want.scale + 1e-6)
        pairs = [*zip(got.samples, want.samples, strict=True), (got.scale, want.scale)]
        worst = max(abs(one - other) if math.isfinite(one) else math.inf for one, other in pairs)
        if not worst <= 4 * limit:
            return f"result {index} is off by {worst:g} where values are around {want.scale:g}"
    return None


def try_piece(piece: LoadedPiece, probe: Probe | None, device: torch.device) -> str | None:
    """Run a loaded piece on the inputs that its probe describes; what is wrong with what it gives, if anything is.

    Args:
        probe: None, or one without outputs, leaves nothing to compare with, and the piece is not run.
    """
    if probe is None or probe.outputs is None:
        return None
    with torch.no_grad():
        return find_problem(probe, piece.as_function()(*make_inputs(probe.inputs, device)))


def _record(graph: fx.GraphModule, size: int | None) -> Probe:
    from workers.compile.canonical import input_specs
    from workers.compile.specialize import example_inputs

    values = example_inputs(input_specs(graph), size or PROBE_TOKENS)
    inputs = tuple(Input(str(value.dtype), tuple(value.shape), tuple(value.stride())) for value in values)
    if not values or values[0].device.type == "meta":
        return Probe(inputs, None)
    return Probe(inputs, _run(graph, inputs, values[0].device))


def _run(graph: fx.GraphModule, inputs: Sequence[Input], device: torch.device) -> tuple[Output | None, ...] | None:
    results = graph.graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    try:
        with torch.inference_mode(False), torch.no_grad():
            tensors = graph(*make_inputs(inputs, device))
            outputs = tuple(
                None if _is_only_allocated(node) else _describe(tensor)
                for node, tensor in zip(results, tensors, strict=True)
            )
    except Exception as error:  # noqa: BLE001  # any operator may be in it
        # A piece may need what only a forward pass has; it is then only loaded when it is checked.
        logger.info("a piece cannot be run alone: %s", error)
        return None
    return outputs if all(output is None or math.isfinite(output.scale) for output in outputs) else None


def _is_only_allocated(node: Any) -> bool:
    """Whether a result is memory that nothing in the piece has written to, or a view of such."""
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        name = str(getattr(node.target, "__name__", node.target))
        if name.startswith(("empty", "new_empty")):
            return True
        if name.rstrip("_") not in _VIEWS:
            return False
        node = node.args[0]
    return False


def _output(dtype: str, shape: Sequence[int], samples: Sequence[float], scale: float) -> Output:
    return Output(dtype, tuple(shape), tuple(samples), scale)


def _describe(tensor: torch.Tensor) -> Output:
    values = tensor.detach().double().flatten()
    scale = float(values.abs().mean()) if values.numel() else 0.0
    return Output(str(tensor.dtype), tuple(tensor.shape), tuple(values[:_NUM_SAMPLES].tolist()), scale)
