"""The decode grid: fills the device where the batch does not, within its workspace, from shapes alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.attention.triton_kernels.tuning import SplitPolicy, plan_splits

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
