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
)


@given(st.integers(1, 2000), st.integers(1, 32), st.integers(1, 200_000), st.integers(1, 200), policies)
def test_plan_keeps_its_bounds(rows: int, kv_heads: int, context: int, num_sms: int, policy: SplitPolicy) -> None:
    plan = plan_splits(rows, kv_heads, context, num_sms, policy)
    assert 1 <= plan.occupancy_splits <= plan.num_splits
    assert plan.num_splits == 1 or rows * kv_heads * plan.num_splits <= policy.max_programs


def test_a_batch_that_fills_the_device_is_not_split_for_occupancy() -> None:
    policy = SplitPolicy(programs_per_sm=2.0, max_chunk=2048)
    assert plan_splits(256, 8, 4096, 132, policy).occupancy_splits == 1
    assert plan_splits(256, 8, 2048, 132, policy).num_splits == 1


def test_a_lone_request_is_spread_over_the_device() -> None:
    policy = SplitPolicy(programs_per_sm=2.0, min_chunk=128)
    plan = plan_splits(1, 8, 131072, 132, policy)
    assert plan.occupancy_splits == 33
    assert plan.num_splits == 64  # max_chunk tokens each, for the longest context


def test_short_contexts_are_not_cut_below_the_least_chunk() -> None:
    assert plan_splits(1, 8, 256, 132, SplitPolicy(min_chunk=128)).num_splits == 2
