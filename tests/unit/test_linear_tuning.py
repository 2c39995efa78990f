"""The choice of kernels for products of few rows: every choice is a kernel that is compiled, and fits the device."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.kernels.linear_tuning import (
    FEW_ROWS_COLUMNS,
    FEW_ROWS_TILES,
    FEW_ROWS_WARPS,
    MAX_WIDE_ROWS,
    WIDE_COLUMNS,
    WIDE_TILES,
    few_rows_tile,
    row_tile,
    wide_tile,
)

#: Bytes of shared memory that a program may have on Hopper; on devices with less a kernel gets fewer stages.
SHARED_BYTES = 227 * 1024

sizes = st.integers(1, 200_000)


@given(st.integers(2, 200), sizes, sizes, st.integers(1, 200), st.booleans())
def test_a_chosen_tile_has_a_kernel_and_room_for_the_rows(
    num_rows: int, num_columns: int, num_features: int, num_sms: int, paired: bool
) -> None:
    few = few_rows_tile(num_rows, num_columns, num_features, num_sms, paired=paired)
    wide = wide_tile(num_rows, num_columns, num_features)
    assert few is None or (few in FEW_ROWS_TILES[paired] and few.block_m >= num_rows)
    assert wide is None or (wide in WIDE_TILES.values() and wide.block_m >= num_rows)
    if num_rows > MAX_WIDE_ROWS:
        assert few is wide is None


def test_every_tile_fits_into_hoppers_shared_memory() -> None:
    for paired, tiles in FEW_ROWS_TILES.items():
        for tile in tiles:
            rows = FEW_ROWS_COLUMNS * (2 if paired else 1) + tile.block_m
            assert rows * tile.block_k * FEW_ROWS_WARPS * 2 * tile.num_stages <= SHARED_BYTES
    for wide in WIDE_TILES.values():
        assert (wide.block_m + wide.block_n) * wide.block_k * 2 * wide.num_stages <= SHARED_BYTES


def test_every_tile_is_chosen_for_some_product() -> None:
    for paired, tiles in FEW_ROWS_TILES.items():
        chosen = {
            few_rows_tile(rows, columns, features, 132, paired=paired)
            for rows in (2, 8, 9, 16, 17, 32)
            for columns in (2048, 4096, 28672)
            for features in (2048, 4096)
        }
        assert chosen - {None} == set(tiles)
    assert {wide_tile(rows, WIDE_COLUMNS, 4096) for rows in (17, 33)} == set(WIDE_TILES.values())
    assert row_tile(2048, paired=False) != row_tile(4096, paired=False) != row_tile(4096, paired=True)
