"""The block pool: allocation order, sharing, caching by content, and the integrity check's alarm."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.request import Request, token_array
from workers.sampling_params import SamplingParams
from workers.scheduler.block_hash import ROOT_HASH, extend_block_hashes, hash_blocks
from workers.scheduler.block_pool import NULL_BLOCK, BlockPool

BLOCK_SIZE = 4


def make_request(token_ids: list[int], request_id: str = "r", *, prompt_logprobs: int | None = None) -> Request:
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    return Request(request_id, token_array(token_ids), len(token_ids), params, max_tokens=16)


def allocate(pool: BlockPool, request: Request) -> list[int]:
    """What the scheduler does at admission; returns the cached prefix."""
    prefix = pool.get_cached_prefix(request)
    assert pool.num_free_blocks_taken(request, prefix) <= pool.num_free_blocks
    pool.allocate_known(request, prefix)
    return prefix


def fill(pool: BlockPool, token_ids: list[int], request_id: str = "r") -> Request:
    """A request whose tokens have all been computed."""
    request = make_request(token_ids, request_id)
    prefix = allocate(pool, request)
    pool.register(request, len(prefix), len(token_ids) // pool.block_size)
    return request


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    request = make_request(list(range(12)))
    allocate(pool, request)
    assert sorted(request.block_ids) == [1, 2, 3]
    assert NULL_BLOCK not in request.block_ids
    assert pool.num_free_blocks == 0
    assert pool.num_usable_blocks == 3


def test_partial_blocks_are_counted_up() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    assert [pool.num_blocks_for(n) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


def test_free_returns_every_block_and_append_adds_one() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    request = make_request([1, 2, 3, 4])
    allocate(pool, request)
    pool.append_block(request)
    assert len(request.block_ids) == 2
    pool.free(request)
    assert request.block_ids == []
    assert pool.num_free_blocks == 3
    pool.check_integrity([])


def test_a_computed_prefix_is_shared_and_counted() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    first = fill(pool, list(range(10)), "first")
    second = make_request([*range(8), 99, 98, 97], "second")
    assert allocate(pool, second) == first.block_ids[:2]
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] not in first.block_ids
    pool.check_integrity([first, second])
    pool.free(first)
    pool.check_integrity([second])
    pool.free(second)
    pool.check_integrity([])


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    first = fill(pool, list(range(8)))
    assert pool.get_cached_prefix(make_request(list(range(8)))) == first.block_ids[:1]
    assert pool.get_cached_prefix(make_request(list(range(9)))) == first.block_ids[:2]


def test_a_block_is_found_only_behind_the_same_tokens() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    fill(pool, [1, 1, 1, 1, 2, 2, 2, 2, 0])
    assert pool.get_cached_prefix(make_request([2, 2, 2, 2, 0])) == []
    assert pool.get_cached_prefix(make_request([3, 3, 3, 3, 2, 2, 2, 2, 0])) == []


def test_what_was_not_registered_is_not_found() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    request = make_request(list(range(9)))
    allocate(pool, request)
    pool.register(request, 0, 1)
    assert pool.get_cached_prefix(make_request(list(range(9)))) == request.block_ids[:1]


def test_caching_can_be_switched_off() -> None:
    pool = BlockPool(16, BLOCK_SIZE, enable_prefix_caching=False)
    fill(pool, list(range(9)))
    assert pool.get_cached_prefix(make_request(list(range(9)))) == []
    assert pool.num_cached_blocks == 0
    assert pool.num_query_tokens == 0


def test_prompt_logprobs_need_the_whole_forward_pass() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    fill(pool, list(range(9)))
    assert pool.get_cached_prefix(make_request(list(range(9)), prompt_logprobs=0)) == []


def test_empty_blocks_go_before_cached_ones_and_the_oldest_content_first() -> None:
    pool = BlockPool(6, BLOCK_SIZE)
    old = fill(pool, [1] * 8, "old")
    new = fill(pool, [2] * 8, "new")
    old_blocks, new_blocks = list(old.block_ids), list(new.block_ids)
    pool.free(old)
    pool.free(new)
    taken = make_request([3] * 17)
    allocate(pool, taken)
    # The one empty block, then the old sequence from its end, then the new one from its end.
    assert taken.block_ids == [5, old_blocks[1], old_blocks[0], new_blocks[1], new_blocks[0]]
    assert pool.num_cached_blocks == 0
    pool.check_integrity([taken])


def test_a_hit_makes_content_recently_used() -> None:
    pool = BlockPool(5, BLOCK_SIZE)
    for value in (1, 2):
        pool.free(fill(pool, [value] * 5, str(value)))
    pool.free(fill(pool, [1] * 5, "again"))
    taken = make_request([3] * 12)
    allocate(pool, taken)
    assert pool.get_cached_prefix(make_request([1] * 5)) != []
    assert pool.get_cached_prefix(make_request([2] * 5)) == []


def test_taking_a_prefix_never_evicts_that_prefix() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    pool.free(fill(pool, list(range(12))))
    request = make_request(list(range(12)))
    prefix = allocate(pool, request)
    assert request.block_ids[:2] == prefix
    assert len(set(request.block_ids)) == 3
    pool.check_integrity([request])


def test_free_cached_blocks_count_as_taken_and_shared_ones_do_not() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    first = fill(pool, list(range(8)), "first")
    request = make_request(list(range(9)))
    assert pool.num_free_blocks_taken(request, pool.get_cached_prefix(request)) == 1
    pool.free(first)
    assert pool.num_free_blocks_taken(request, pool.get_cached_prefix(request)) == 3


def test_the_same_content_computed_twice_is_cached_once() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    first, second = make_request(list(range(8)), "first"), make_request(list(range(8)), "second")
    allocate(pool, first)
    allocate(pool, second)
    pool.register(first, 0, 2)
    pool.register(second, 0, 2)
    assert pool.num_cached_blocks == 2
    pool.check_integrity([first, second])
    pool.free(first)
    assert pool.get_cached_prefix(make_request(list(range(9)))) != []
    pool.free(second)
    pool.check_integrity([])


def test_counters_and_held_hashes() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    fill(pool, list(range(8)), "first")
    fill(pool, list(range(8)), "second")
    assert (pool.num_query_tokens, pool.num_hit_tokens) == (16, 4)
    assert pool.held_hashes() == frozenset(hash_blocks(list(range(8)), BLOCK_SIZE))


def test_recomputation_is_no_prefix_query() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    request = fill(pool, list(range(8)))
    pool.free(request)
    request.num_preemptions = 1
    allocate(pool, request)
    assert pool.num_query_tokens == 8


def test_integrity_check_reports_a_leak() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    allocate(pool, make_request(list(range(8))))
    with pytest.raises(AssertionError, match="2 blocks are counted as held, 0 are"):
        pool.check_integrity([])


def test_integrity_check_reports_uncounted_sharing() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    first, second = make_request([1]), make_request([2], "second")
    allocate(pool, first)
    allocate(pool, second)
    second.block_ids = list(first.block_ids)
    with pytest.raises(AssertionError, match="has 2 holders but a count of 1"):
        pool.check_integrity([first, second])


def test_integrity_check_reports_use_after_free() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    request = make_request([1])
    allocate(pool, request)
    kept = list(request.block_ids)
    pool.free(request)
    request.block_ids = kept
    with pytest.raises(AssertionError, match="count of 0"):
        pool.check_integrity([request])


def test_integrity_check_reports_the_null_block() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    request = make_request([1])
    request.block_ids = [NULL_BLOCK]
    with pytest.raises(AssertionError, match="null block"):
        pool.check_integrity([request])


def test_freeing_twice_is_caught_at_once() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    request = make_request([1])
    allocate(pool, request)
    kept = list(request.block_ids)
    pool.free(request)
    request.block_ids = kept
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(request)


def test_writing_to_a_cached_block_is_caught() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    request = fill(pool, list(range(8)))
    with pytest.raises(AssertionError, match="while it was cached"):
        pool.register(request, 0, 1)


def test_running_out_is_the_callers_mistake() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    request = make_request([1])
    allocate(pool, request)
    with pytest.raises(AssertionError, match="no free block"):
        pool.append_block(request)


def test_nothing_is_hashed_beyond_the_first_block_that_is_not_cached() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    first = fill(pool, list(range(12)))
    request = make_request([*range(8), *range(100, 112)])
    assert pool.get_cached_prefix(request) == first.block_ids[:2]
    assert request.block_hashes == hash_blocks(request.token_ids[:12], BLOCK_SIZE)
    assert pool.get_cached_prefix(request) == first.block_ids[:2]
    pool.name_blocks(request, 4)
    assert request.block_hashes == hash_blocks(request.token_ids[:16], BLOCK_SIZE)


def test_without_a_cache_nothing_is_hashed() -> None:
    pool = BlockPool(16, BLOCK_SIZE, enable_prefix_caching=False)
    request = fill(pool, list(range(12)))
    pool.name_blocks(request, 3)
    assert request.block_hashes == []


@pytest.mark.parametrize("wrong", [-1, 2**32, 1.5, "1"])
def test_token_ids_are_unsigned_integers(wrong: Any) -> None:
    assert token_array([0, 2**32 - 1]).tolist() == [0, 2**32 - 1]
    with pytest.raises(struct.error):
        token_array([1, wrong])


def test_hashes_follow_their_definition() -> None:
    tokens = [7, 70_000, 0, 2**32 - 1]
    first = hashlib.blake2s(ROOT_HASH + struct.pack("<2I", *tokens[:2])).digest()
    second = hashlib.blake2s(first + struct.pack("<2I", *tokens[2:])).digest()
    assert hash_blocks([*tokens, 5], 2) == [first, second]


def test_a_block_with_unknown_tokens_has_no_name() -> None:
    with pytest.raises(AssertionError, match="known"):
        extend_block_hashes([], token_array([1, 2, 3]), 2, 2)


@given(st.lists(st.integers(0, 3), max_size=24), st.integers(1, 5), st.lists(st.integers(0, 6), max_size=6))
def test_hashing_in_pieces_equals_hashing_at_once(tokens: list[int], block_size: int, cuts: list[int]) -> None:
    hashes: list[bytes] = []
    known = token_array(tokens)
    for cut in sorted(cuts):
        extend_block_hashes(hashes, known, block_size, min(cut, len(tokens) // block_size))
    extend_block_hashes(hashes, known, block_size, len(tokens) // block_size)
    assert hashes == hash_blocks(tokens, block_size)


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12), st.integers(1, 3))
def test_two_blocks_share_a_name_only_with_all_tokens_before_them(a: list[int], b: list[int], block_size: int) -> None:
    for index, (hash_a, hash_b) in enumerate(zip(hash_blocks(a, block_size), hash_blocks(b, block_size), strict=False)):
        stop = (index + 1) * block_size
        assert (hash_a == hash_b) == (a[:stop] == b[:stop])
