"""What a verification found, as data, and which graph mode is safe meanwhile.

Pure: knows the forms that are compared and what their failures mean; knows no torch.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection
from typing import Any

from workers.modes import CUDAGraphMode


class FormName(enum.StrEnum):
    """One way to run a forward pass, held against the eager, unpadded one."""

    PADDED = "eager, padded"
    COMPILED = "compiled, padded"
    PIECEWISE = "PIECEWISE"
    FULL_MIXED = "FULL, mixed batches"
    FULL_DECODE = "FULL, decode batches"
    DECODE_STEP = "FULL, table to token"


class Blame(enum.StrEnum):
    """What makes a form differ."""

    ADDRESS = "the address"
    SHAPE = "the shape"
    OP = "the op"


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One form at one capture size.

    Attributes:
        error: Largest difference from eager in any row, relative to the row; infinite for NaN.
        failed_case: ``full``, ``padded`` or ``poisoned``, or None if all agree.
        problem: What is wrong, in words; None if nothing is.
    """

    form: FormName
    num_tokens: int
    num_cases: int
    error: float
    failed_case: str | None = None
    problem: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Why a form differs.

    Attributes:
        num_tokens: Capture size of the smallest graph that shows it.
        piece: Where the first difference is: ``piece 3``, or ``after piece 3`` for an op between pieces.
        op: The first op whose result differs; None if it could not be narrowed down that far.
        explanation: What was tried, and what follows from it.
    """

    form: FormName
    num_tokens: int
    piece: str
    op: str | None
    blame: Blame
    explanation: str


@dataclasses.dataclass(frozen=True, slots=True)
class VerifyReport:
    """Everything that was compared.

    Attributes:
        skipped: Forms that this model or device does not have, and why.
        safe_mode: The best mode all of whose forms agree with eager.
    """

    device: str
    backend: str
    attention: str
    tolerance: float
    checks: list[Check]
    skipped: dict[str, str]
    findings: list[Finding]
    safe_mode: str

    @property
    def is_ok(self) -> bool:
        """Whether nothing differs."""
        return all(check.problem is None for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"is_ok": self.is_ok}


def safe_mode(failed: Collection[FormName], skipped: Collection[FormName] = ()) -> CUDAGraphMode:
    """The graph mode that leaves the most batches in graphs without using a form that failed or was not checked.

    A padded batch that is wrong without a graph is wrong in every graph. Pieces that are wrong rule out their graphs.
    """
    wrong = {*failed, *skipped}
    if FormName.PADDED in wrong:
        return CUDAGraphMode.NONE
    has_pieces = not {FormName.COMPILED, FormName.PIECEWISE} & wrong
    has_full_decode = not {FormName.FULL_DECODE, FormName.DECODE_STEP, FormName.COMPILED} & wrong
    if has_full_decode:
        return CUDAGraphMode.FULL_AND_PIECEWISE if has_pieces else CUDAGraphMode.FULL_DECODE_ONLY
    return CUDAGraphMode.PIECEWISE if has_pieces else CUDAGraphMode.NONE
