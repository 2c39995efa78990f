"""Which kernel takes a product of few rows, and with what tile: measured on an H100, by size.

Knows numbers only. The measurements are in ``benchmarks/results/linear_h100_202611.md``.

Abbreviations: N = output features (of one half, if there are two), K = input features.
"""

from __future__ import annotations

import dataclasses

#: Most rows of a product that is ours whatever the weight's shape.
MAX_FEW_ROWS = 16
#: Most rows of one whose weight has too few columns for cuBLAS's tiles to fill the device.
MAX_NARROW_ROWS = 32
#: Columns from which tiles without a split fill the device, and most rows with which they are faster than cuBLAS's.
WIDE_COLUMNS = 32768
MAX_WIDE_ROWS = 64

#: Warps of a few-rows program, each of which has its share of the input features.
FEW_ROWS_WARPS = 4
#: Columns of a few-rows program: what one matrix instruction takes.
FEW_ROWS_COLUMNS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class RowTile:
    """A program for one row.

    Attributes:
        block_n: Columns (of each half).
        block_k: Input features at a time.
        num_warps: Of the program.
    """

    block_n: int
    block_k: int
    num_warps: int


@dataclasses.dataclass(frozen=True, slots=True)
class FewRowsTile:
    """A program for up to ``block_m`` rows and 16 columns (of each half).

    Attributes:
        block_m: Rows.
        block_k: Input features of one warp at a time.
        num_stages: Tiles on their way or in use.
    """

    block_m: int
    block_k: int
    num_stages: int


@dataclasses.dataclass(frozen=True, slots=True)
class WideTile:
    """A program for up to ``block_m`` rows of a very wide product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: One pass over short rows of weights, or programs large enough to keep long ones coming.
SHORT_ROW, LONG_ROW, PAIRED_ROW = RowTile(2, 1024, 4), RowTile(2, 2048, 8), RowTile(1, 1024, 4)

#: By the number of rows they take.
WIDE_TILES = {32: WideTile(32, 64, 128, 4, 4), 64: WideTile(64, 64, 128, 4, 4)}

#: Every tile that :func:`few_rows_tile` can give, by whether the weight has two halves.
FEW_ROWS_TILES = {
    False: (
        FewRowsTile(8, 128, 4),
        FewRowsTile(8, 128, 6),
        FewRowsTile(8, 256, 3),
        FewRowsTile(16, 128, 4),
        FewRowsTile(16, 128, 6),
        FewRowsTile(32, 128, 4),
    ),
    True: (FewRowsTile(8, 128, 4), FewRowsTile(16, 128, 4)),
}


def row_tile(num_features: int, *, paired: bool) -> RowTile:
    """For one row.

    Args:
        num_features: K.
        paired: The weight has two halves, gate and up.
    """
    if paired:
        return PAIRED_ROW
    return SHORT_ROW if num_features <= 2048 else LONG_ROW


def few_rows_tile(
    num_rows: int, num_columns: int, num_features: int, num_sms: int, *, paired: bool
) -> FewRowsTile | None:
    """For 2 rows or more; None where cuBLAS is as fast or faster.

    Args:
        num_rows: At least 2.
        num_columns: N.
        num_features: K.
        num_sms: Multiprocessors of the device.
        paired: The weight has two halves, gate and up.
    """
    num_programs = -(-num_columns // FEW_ROWS_COLUMNS)
    if num_rows > MAX_FEW_ROWS:
        is_narrow = num_programs <= num_sms and not paired
        return FewRowsTile(32, 128, 4) if is_narrow and num_rows <= MAX_NARROW_ROWS else None
    block_m = 8 if num_rows <= 8 else 16
    if paired:
        return FewRowsTile(block_m, 128, 4)
    if num_programs <= num_sms:
        # Alone on its multiprocessor, a program must have enough on its way by itself.
        return FewRowsTile(block_m, 128, 6)
    if block_m == 8 and num_programs <= 2 * num_sms and num_features >= 4096:
        return FewRowsTile(8, 256, 3)
    return FewRowsTile(block_m, 128, 4)


def wide_tile(num_rows: int, num_columns: int, num_features: int) -> WideTile | None:
    """For a language-model head; None where cuBLAS is as fast or faster."""
    if num_columns < WIDE_COLUMNS or num_features % 128 or num_rows > MAX_WIDE_ROWS:
        return None
    return WIDE_TILES[next(rows for rows in WIDE_TILES if rows >= num_rows)]
