"""Penalties, truncation and draw row by row in numpy: the CPU's shortcut, with the same results bit for bit.

On a CPU whole-vocabulary passes are dear and waiting costs nothing, so it pays to look at the values: penalties
touch only tokens that were seen, and truncation only those that can survive it. (Sorting 8 rows of 49152 takes one
core 30 ms; this, on a real model's rows, about 2.) Sums are of whole numbers and everything else is single IEEE
operations in the order of the fixed-shape code, so nothing depends on which of the two ran.

Shape suffixes: R rows, S slots, V vocabulary, C tokens of one row.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from workers.sampling.rows import SamplingRows
from workers.sampling.state import PROMPT_BIT

_Floats = npt.NDArray[np.floating]
_Ids = npt.NDArray[np.intp]


def runs_by_row(logits_RV: torch.Tensor) -> bool:
    """Whether the shortcut may be taken: on a CPU, and not while the code is being traced."""
    return logits_RV.device.type == "cpu" and not torch.compiler.is_compiling()


def penalise_by_row(
    logits_RV: torch.Tensor, counts_SV: torch.Tensor, slots_R: torch.Tensor, rows: SamplingRows
) -> torch.Tensor:
    """``workers.sampling.transforms.apply_penalties`` for the slots' counts."""
    result_RV = logits_RV.clone()
    penalties = (rows.repetition_penalty, rows.frequency_penalty, rows.presence_penalty)
    penalties_R3 = torch.cat(penalties, dim=1).numpy()
    neutral = np.array((1, 0, 0), dtype=np.float32)
    for row, slot in enumerate(slots_R.tolist()):
        if not np.array_equal(penalties_R3[row], neutral):
            _penalise(result_RV[row].numpy(), counts_SV[slot].numpy(), *penalties_R3[row])
    return result_RV


def _penalise(
    logits_V: _Floats,
    counts_V: npt.NDArray[np.int32],
    repetition: np.float32,
    frequency: np.float32,
    presence: np.float32,
) -> None:
    ids_C = np.flatnonzero(counts_V)
    x_C = logits_V[ids_C]
    occurrences_C = (counts_V[ids_C] & (PROMPT_BIT - 1)).astype(np.float32)
    x_C = np.where(x_C > 0, x_C / repetition, x_C * repetition)
    x_C -= frequency * occurrences_C
    x_C -= presence * (occurrences_C > 0)
    logits_V[ids_C] = x_C


def choose_by_row(
    scaled_RV: torch.Tensor, weights_RV: torch.Tensor, rows: SamplingRows, uniform_R: torch.Tensor
) -> torch.Tensor:
    """``truncation.keep_threshold`` and ``draw.draw`` in one; greedy rows are left at 0."""
    vocab_size = scaled_RV.shape[1]
    token_ids_R = torch.zeros(len(scaled_RV), dtype=torch.int64)
    columns = (rows.is_greedy, rows.log_min_p, rows.top_k, rows.top_p, uniform_R)
    for row, (greedy, threshold, k, p, u) in enumerate(zip(*(c.flatten().tolist() for c in columns), strict=True)):
        if greedy:
            continue
        scaled_V, weights_V = scaled_RV[row].numpy(), weights_RV[row].numpy()
        if k < vocab_size:
            threshold = max(threshold, float(np.partition(scaled_V, vocab_size - k)[vocab_size - k]))
        ids_C = np.flatnonzero(scaled_V >= threshold) if threshold > -math.inf else None
        if p < 1:
            ids_C = _nucleus(scaled_V, weights_V, ids_C, p)
        token_ids_R[row] = _draw(weights_V, ids_C, u)
    return token_ids_R


def _nucleus(scaled_V: _Floats, weights_V: _Floats, ids_C: _Ids | None, p: float) -> _Ids:
    """Tokens of ``ids_C`` (None: all) that top-p keeps, in ascending order.

    Tokens lighter than ``(1 - p) * total / V`` cannot hold more than the share ``1 - p`` together, so the nucleus
    lies within the others, and only those need sorting. Half of that bound leaves room for rounding.
    """
    weights_C = weights_V if ids_C is None else weights_V[ids_C]
    total = weights_C.sum()
    heavy_C = np.flatnonzero(weights_C >= max((1.0 - p) * total / len(weights_V) / 2, 1.0))
    ids_C = heavy_C if ids_C is None else ids_C[heavy_C]
    scaled_C = scaled_V[ids_C]
    order_C = np.argsort(scaled_C)[::-1]
    weights_C = weights_V[ids_C[order_C]]
    num_kept = int(np.count_nonzero(np.cumsum(weights_C) - weights_C < p * total))
    return ids_C[scaled_C >= scaled_C[order_C[max(num_kept - 1, 0)]]] if len(ids_C) else ids_C


def _draw(weights_V: _Floats, ids_C: _Ids | None, uniform: float) -> int:
    ends_C = np.cumsum(weights_V if ids_C is None else weights_V[ids_C])
    if not len(ends_C) or not ends_C[-1] > 0:
        return len(weights_V) - 1
    position = int(np.searchsorted(ends_C, math.floor(uniform * ends_C[-1]), side="right"))
    return position if ids_C is None else int(ids_C[position])
