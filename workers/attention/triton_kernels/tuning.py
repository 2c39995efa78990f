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
        max_registers: Of a thread, or 0 for what the compiler likes: fewer let more programs share a multiprocessor.
        overlap_launch: Launch while the previous kernel drains, then wait for it, on a device that can.
    """

    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 128
    overlap_launch: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillTile:
    """How one prefill program works.

    Attributes:
        block_m: Query rows: tokens times heads of a group.
        block_n: Keys per iteration.
        num_warps: Warps per program.
        num_stages: Tiles of keys, and as many of values, in shared memory.
        hopper: Run :mod:`prefill_hopper`'s kernel instead of :mod:`prefill`'s; see :func:`has_hopper_prefill`.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    hopper: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SplitPolicy:
    """When a request's context is divided among several decode programs.

    A split pays while the batch alone does not fill the device, and for contexts so long that one program would
    outlast the rest of the batch. It costs a round trip of partial results, and a merge at the end. A program that
    finds nothing to do costs as well, once the device is full: it waits for a place.

    The workspace for partial results takes ``(max_programs + overflow_chunks * num_kv_heads) * group *
    (head_dim + 2) * 4`` bytes.

    Attributes:
        programs_per_sm: Programs wanted on each multiprocessor: splitting stops there.
        min_chunk: Fewest cached tokens worth a program of their own.
        max_chunk: Most cached tokens that one program reads; what exceeds the splits of a row overflows.
        max_programs: A batch of more rows times KV heads than this is never split, however long a context.
        overflow_chunks: Most chunks, per KV head, that overflow programs share out. Where contexts are so many and
            so long that this does not suffice, their chunks grow beyond ``max_chunk``.
        overflow_programs_per_sm: Overflow programs on each multiprocessor.
    """

    programs_per_sm: float = 2.0
    min_chunk: int = 256
    max_chunk: int = 1024
    max_programs: int = 4096
    overflow_chunks: int = 2048
    overflow_programs_per_sm: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class SplitPlan:
    """What a decode launch is given; a function of padded shapes only, so a captured graph may hold it.

    Attributes:
        num_splits: Third dimension of the grid: most chunks of a context of ``num_splits * max_chunk`` tokens.
        overflow_rows: Rows of the grid beyond the batch's, each ``num_splits`` overflow programs per KV head.
        min_chunk: As in :class:`SplitPolicy`.
        max_chunk: As in :class:`SplitPolicy`; ``UNLIMITED // num_splits`` where nothing may overflow.
    """

    num_splits: int
    overflow_rows: int
    min_chunk: int
    max_chunk: int


#: Releases of Triton whose Gluon :mod:`prefill_hopper` was written for.
_GLUON_RELEASES = ("3.6.",)

#: A length that no context reaches, and whose sum with one is still 32 bits wide.
UNLIMITED = 1 << 30


def plan_splits(num_rows: int, num_kv_heads: int, max_context: int, num_sms: int, policy: SplitPolicy) -> SplitPlan:
    """Size the decode grid for a padded batch.

    Args:
        num_rows: Rows of the (padded) batch.
        num_kv_heads: KV heads; ``num_rows * num_kv_heads`` programs run even without splitting.
        max_context: Longest context that the block table can hold, in tokens.
        num_sms: Multiprocessors of the device.
        policy: The rule.

    Returns:
        A plan whose chunks fit the workspace whatever the lengths.
    """
    programs = max(num_rows * num_kv_heads, 1)
    wanted = max(round(policy.programs_per_sm * num_sms), 1)
    affordable = max(policy.max_programs // programs, 1)
    useful = max(_ceil_div(max_context, policy.min_chunk), 1)
    num_splits = min(_ceil_div(wanted, programs), affordable, useful)
    # A lone request is cut evenly; and where even unsplit rows exceed the workspace, none may be split.
    may_overflow = num_rows > 1 and programs <= policy.max_programs and num_rows < policy.overflow_chunks
    if not may_overflow or max_context <= num_splits * policy.max_chunk:
        return SplitPlan(num_splits, 0, policy.min_chunk, UNLIMITED // num_splits)
    overflow_programs = max(round(policy.overflow_programs_per_sm * num_sms), 1)
    overflow_rows = _ceil_div(overflow_programs, num_kv_heads * num_splits)
    return SplitPlan(num_splits, overflow_rows, policy.min_chunk, policy.max_chunk)


def default_decode_tile(head_dim: int) -> DecodeTile:
    """The decode tile for a head size (elements of 2 bytes)."""
    if head_dim <= 64:
        return DecodeTile(block_n=64, num_warps=4, num_stages=4)
    if head_dim <= 128:
        return DecodeTile(block_n=32, num_warps=4, num_stages=4)
    return DecodeTile(block_n=16, num_warps=4, num_stages=4)


def has_hopper_prefill(
    capability: tuple[int, int], triton_release: str, head_dim: int, sliding_window: int | None
) -> bool:
    """Whether :mod:`prefill_hopper` can be used.

    Args:
        capability: Compute capability of the device.
        triton_release: Gluon is not yet stable, so only releases that were tried are trusted.
        head_dim: Elements of a head.
        sliding_window: Of the model.
    """
    return (
        capability == (9, 0)
        and triton_release.startswith(_GLUON_RELEASES)
        and head_dim in (64, 128)
        and sliding_window is None
    )


def default_prefill_tile(head_dim: int, *, hopper: bool = False) -> PrefillTile:
    """The prefill tile for a head size (elements of 2 bytes)."""
    if hopper:
        # Two programs share a multiprocessor, and take turns at its matrix unit.
        return PrefillTile(block_m=64, block_n=64, num_warps=4, num_stages=2, hopper=True)
    if head_dim <= 64:
        return PrefillTile(block_m=128, block_n=64, num_warps=4, num_stages=3)
    if head_dim <= 128:
        return PrefillTile(block_m=128, block_n=64, num_warps=8, num_stages=3)
    return PrefillTile(block_m=64, block_n=32, num_warps=4, num_stages=2)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
