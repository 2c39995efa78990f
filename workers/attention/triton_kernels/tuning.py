"""Sizes of the attention kernels: tile tables, and how a decode is split over the device.

Plain arithmetic on shapes; knows neither triton nor torch. Everything here may be replaced through the backend's
constructor; the tables hold what was measured best (``benchmarks/attention.py``).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeTile:
    """How one decode program works.

    Attributes:
        block_n: Cached tokens per iteration. Best a divisor of the cache's block size: then a tile needs one
            block-table entry instead of one per row.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline; ``num_stages - 1`` tiles are in flight.
        overlap_launch: Launch while the previous kernel drains (programmatic dependent launch), then wait for it.
    """

    block_n: int
    num_warps: int
    num_stages: int
    overlap_launch: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillTile:
    """How one prefill program works: ``block_m`` query rows (tokens times heads of a group), ``block_n`` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, slots=True)
class SplitPolicy:
    """When a request's context is divided among several decode programs.

    A split pays while the batch alone does not fill the device, and for contexts so long that one program would
    outlast the rest of the batch. It costs a round trip of partial results and, at the end, a merge.

    Attributes:
        programs_per_sm: Programs wanted on each multiprocessor before splitting stops.
        min_chunk: Fewest cached tokens worth a program of their own.
        max_chunk: Most cached tokens that one program reads while ``max_programs`` allows more programs.
        max_programs: Bound on the launch grid when splitting; also sizes the workspace for partial results
            (``max_programs * group * (head_dim + 2) * 4`` bytes).
        fused_merge: The program that finishes last merges; otherwise a second launch does.
    """

    programs_per_sm: float = 2.0
    min_chunk: int = 128
    max_chunk: int = 2048
    max_programs: int = 4096
    fused_merge: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class SplitPlan:
    """What a decode launch is given; a function of padded shapes only, so a captured graph may hold it.

    Attributes:
        num_splits: Third dimension of the grid, and most chunks of one request.
        occupancy_splits: Chunks per request that fill the device.
        min_chunk: As in :class:`SplitPolicy`.
        max_chunk: As in :class:`SplitPolicy`.
    """

    num_splits: int
    occupancy_splits: int
    min_chunk: int
    max_chunk: int


def plan_splits(num_rows: int, num_kv_heads: int, max_context: int, num_sms: int, policy: SplitPolicy) -> SplitPlan:
    """Size the decode grid for a padded batch.

    Args:
        num_rows: Rows of the (padded) batch.
        num_kv_heads: KV heads; ``num_rows * num_kv_heads`` programs run even without splitting.
        max_context: Longest context that the block table can hold, in tokens.
        num_sms: Multiprocessors of the device.
        policy: The rule.

    Returns:
        A plan with ``num_rows * num_kv_heads * num_splits <= policy.max_programs`` wherever num_splits is above 1.
    """
    programs = max(num_rows * num_kv_heads, 1)
    wanted = max(round(policy.programs_per_sm * num_sms), 1)
    affordable = max(policy.max_programs // programs, 1)
    useful = max(_ceil_div(max_context, policy.min_chunk), 1)
    occupancy = min(_ceil_div(wanted, programs), affordable, useful)
    num_splits = min(max(occupancy, _ceil_div(max_context, policy.max_chunk)), affordable)
    return SplitPlan(num_splits, occupancy, policy.min_chunk, policy.max_chunk)


def default_decode_tile(head_dim: int) -> DecodeTile:
    """The decode tile for a head size (elements of 2 bytes)."""
    if head_dim <= 64:
        return DecodeTile(block_n=64, num_warps=4, num_stages=4)
    if head_dim <= 128:
        return DecodeTile(block_n=32, num_warps=4, num_stages=4)
    return DecodeTile(block_n=16, num_warps=4, num_stages=4)


def default_prefill_tile(head_dim: int) -> PrefillTile:
    """The prefill tile for a head size (elements of 2 bytes)."""
    if head_dim <= 64:
        return PrefillTile(block_m=128, block_n=64, num_warps=4, num_stages=3)
    if head_dim <= 128:
        return PrefillTile(block_m=128, block_n=64, num_warps=8, num_stages=3)
    return PrefillTile(block_m=64, block_n=32, num_warps=4, num_stages=2)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
