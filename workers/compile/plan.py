"""The plan: how pieces, split ops and weights make up a model, as data.

A plan is JSON and nothing but JSON, so reading one executes nothing. It names weights as the model does and pieces by
what they compute; the bytes of a piece are named by their digest. Knows nothing about tensors or compilers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Self

from workers.artifacts.digest import canonical_json
from workers.compile.errors import PlanMismatchError

#: Raise it whenever a plan of the previous code would be misread.
PLAN_VERSION = 2

#: A value of the plan: ``a0`` argument, ``w3`` weight, ``v5`` result of an earlier step; or ``{"const": ...}``, or a
#: list of values.
Value = str | dict[str, Any] | list[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as compiled for.

    Attributes:
        shape: Sizes; a string stands for one that varies.
        stride: Of a weight, in elements; empty for an argument, which is contiguous.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    stride: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class PieceStep:
    """Call a piece and name its results."""

    piece: str
    args: list[Value]
    results: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class OpStep:
    """Call a split op, ``namespace::name``, and name its result if it is used."""

    op: str
    args: list[Value]
    kwargs: dict[str, Value]
    result: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Build:
    """One compiled form of a piece.

    Attributes:
        format: Name of the piece format.
        size: The only value of the dynamic dimension that it serves, or None for every value.
        sha256: Digest of its bytes, their name in the store.
        seconds: What building it took.
    """

    format: str
    size: int | None
    sha256: str
    num_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class InputSpec:
    """An input of a piece.

    Attributes:
        shape: Sizes; a string is arithmetic on sizes that vary (``n0``).
        stride: In elements; likewise.
    """

    dtype: str
    device: str
    shape: tuple[int | str, ...]
    stride: tuple[int | str, ...]


@dataclasses.dataclass(slots=True)
class PieceRecord:
    """A unique piece. With its source, its build in the format ``fx``, it can be built in any format.

    Attributes:
        ops: Number of calls of each operation in it, most frequent first.
        inputs: What it takes.
        builds: Its compiled forms.
    """

    ops: dict[str, int]
    inputs: list[InputSpec]
    builds: list[Build] = dataclasses.field(default_factory=list)

    def find_build(self, piece_format: str, size: int | None) -> Build | None:
        """The build of this format and size, if there is one."""
        return next((build for build in self.builds if (build.format, build.size) == (piece_format, size)), None)


@dataclasses.dataclass(slots=True)
class Plan:
    """How to run a model without tracing it.

    Attributes:
        factors: Everything that the compiled code depends on, by name.
        arguments: In the order of ``forward``'s parameters.
        dynamic_dims: The varying dimension of each argument.
        weights: What the model must bring.
        steps: In execution order.
        results: What ``forward`` returns, flattened.
        returns_tuple: Whether it returns a tuple.
        pieces: Unique pieces by key, in the order of their first call.
        passes: Matches of each fusion pass, in the order in which they ran.
        trace_seconds: What the Dynamo trace took.
    """

    factors: dict[str, Any]
    arguments: list[TensorSpec]
    dynamic_dims: list[int]
    weights: list[TensorSpec]
    steps: list[PieceStep | OpStep]
    results: list[Value]
    returns_tuple: bool
    pieces: dict[str, PieceRecord]
    passes: dict[str, int]
    trace_seconds: float

    def piece_calls(self) -> list[str]:
        """Key of the piece of every piece step, in order."""
        return [step.piece for step in self.steps if isinstance(step, PieceStep)]

    def formats(self, size: int | None = None) -> list[str]:
        """Formats in which every piece can be had for this size, in the order of their first build."""
        names = dict.fromkeys(build.format for record in self.pieces.values() for build in record.builds)
        return [name for name in names if all(record.find_build(name, size) for record in self.pieces.values())]

    def sizes(self) -> list[int | None]:
        """Sizes that there are builds for, None (every size) first."""
        sizes = {build.size for record in self.pieces.values() for build in record.builds}
        return sorted(sizes, key=lambda size: size or 0)

    def check_weights(self, weights: Mapping[str, TensorSpec]) -> None:
        """Compare the live model's weights with those the plan was compiled for.

        Raises:
            PlanMismatchError: One is missing or has another shape, dtype or layout; the first three are named.
        """
        problems = list(_weight_problems(self.weights, weights))
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise PlanMismatchError(f"The plan was compiled for another model: {'; '.join(problems[:3])}{more}.")

    def to_json(self) -> str:
        """The plan as text. Passes, pieces and operations keep their order, which says something; factors have none."""
        fields = {"version": PLAN_VERSION, **dataclasses.asdict(self)}
        return json.dumps(fields | {"factors": json.loads(canonical_json(self.factors))})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a plan.

        Raises:
            PlanMismatchError: It was written by another version, or is damaged.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("version")
            if version != PLAN_VERSION:
                raise PlanMismatchError(f"The plan has version {version}, and this code reads {PLAN_VERSION}.")
            fields["arguments"] = [_tensor_spec(spec) for spec in fields["arguments"]]
            fields["weights"] = [_tensor_spec(spec) for spec in fields["weights"]]
            fields["steps"] = [PieceStep(**step) if "piece" in step else OpStep(**step) for step in fields["steps"]]
            fields["pieces"] = {key: _piece_record(record) for key, record in fields["pieces"].items()}
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanMismatchError(f"The plan is damaged: {error}.") from error


def _tensor_spec(fields: dict[str, Any]) -> TensorSpec:
    return TensorSpec(fields["name"], fields["dtype"], tuple(fields["shape"]), tuple(fields["stride"]))


def _piece_record(fields: dict[str, Any]) -> PieceRecord:
    inputs = [
        InputSpec(spec["dtype"], spec["device"], tuple(spec["shape"]), tuple(spec["stride"]))
        for spec in fields["inputs"]
    ]
    return PieceRecord(fields["ops"], inputs, [Build(**build) for build in fields["builds"]])


def _weight_problems(expected: list[TensorSpec], weights: Mapping[str, TensorSpec]) -> Iterator[str]:
    for spec in expected:
        live = weights.get(spec.name)
        if live is None:
            yield f"weight {spec.name} is missing"
            continue
        for field in ("dtype", "shape", "stride"):
            compiled, found = getattr(spec, field), getattr(live, field)
            if compiled != found:
                yield f"weight {spec.name} has {field} {_text(found)}, not {_text(compiled)}"
                break


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
