"""The decode grid fills the device where the batch does not, within its workspace; which prefill kernel is for whom."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.attention.triton_kernels.tuning import (
    SplitPolicy,
    default_prefill_tile,
    has_hopper_prefill,
    plan_splits,
)

policies = st.builds(
    SplitPolicy,
    programs_per_sm=st.floats(0.25, 8),
    min_chunk=st.sampled_from([16, 64, 128, 512]),
    max_chunk=st.sampled_from([512, 1024, 4096]),
    max_programs=st.sampled_from([64, 1024, 4096]),
    overflow_chunks=st.sampled_from([16, 1024]),
)


@given(st.integers(1, 2000), st.integers(1, 32), st.integers(1, 200_000), st.integers(1, 200), policies)
def test_plan_keeps_within_the_workspace(
    rows: int, kv_heads: int, context: int, num_sms: int, policy: SplitPolicy
) -> None:
    plan = plan_splits(rows, kv_heads, context, num_sms, policy)
    assert plan.num_splits >= 1
    can_split = plan.num_splits > 1 or plan.overflow_rows > 0
    assert not can_split or rows * kv_heads * plan.num_splits <= policy.max_programs
    # Without overflow programs, no context may have more chunks than splits.
    assert plan.overflow_rows > 0 or context <= plan.num_splits * plan.max_chunk
    # With them, there is room for every row's last, partial chunk.
    assert plan.overflow_rows == 0 or rows < policy.overflow_chunks
    assert plan.num_splits * plan.max_chunk < 2**31


def test_a_batch_that_fills_the_device_is_split_only_where_contexts_are_long() -> None:
    policy = SplitPolicy(programs_per_sm=2.0, max_chunk=1024, overflow_programs_per_sm=1.0)
    short, long = (plan_splits(256, 8, context, 132, policy) for context in (1024, 4096))
    assert (short.num_splits, short.overflow_rows) == (1, 0)
    assert (long.num_splits, long.overflow_rows) == (1, 17)  # 136 programs more


def test_a_lone_request_is_spread_evenly_over_the_device() -> None:
    plan = plan_splits(1, 8, 131072, 132, SplitPolicy(programs_per_sm=2.0, min_chunk=128, max_chunk=1024))
    assert (plan.num_splits, plan.overflow_rows) == (33, 0)


def test_short_contexts_are_not_cut_below_the_least_chunk() -> None:
    assert plan_splits(1, 8, 256, 132, SplitPolicy(min_chunk=128)).num_splits == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"head_dim": 64}, True),
        ({"capability": (8, 9)}, False),
        ({"capability": (10, 0)}, False),
        ({"triton_release": "3.7.1"}, False),
        ({"head_dim": 96}, False),
        ({"head_dim": 256}, False),
        ({"sliding_window": 1024}, False),
    ],
)
def test_the_hopper_kernel_is_for_what_it_was_tried_with(change: dict[str, Any], expected: bool) -> None:
    asked: dict[str, Any] = {
        "capability": (9, 0), "triton_release": "3.6.0", "head_dim": 128, "sliding_window": None,
    }  # fmt: skip
    assert has_hopper_prefill(**(asked | change)) is expected


@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_hopper_programs_fit_a_multiprocessor(head_dim: int) -> None:
    tile = default_prefill_tile(head_dim, hopper=True)
    assert tile.hopper
    rows = tile.block_m + 2 * tile.num_stages * tile.block_n
    assert 2 * (rows * head_dim * 2 + 1024) <= 228 * 1024
