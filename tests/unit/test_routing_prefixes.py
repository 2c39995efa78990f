"""A prefix cache followed from afar: journal, feed and index agree with the cache itself."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.routing.prefix_index import PrefixFeed, PrefixIndex
from workers.request import Request, token_array
from workers.sampling_params import SamplingParams
from workers.scheduler.block_hash import hash_blocks
from workers.scheduler.block_pool import BlockPool
from workers.scheduler.prefix_journal import NAME_BYTES, PrefixChanges, PrefixJournal, names_of, split_names

BLOCK_SIZE = 4


def run_prompt(pool: BlockPool, tokens: list[int]) -> None:
    """A request that computes its prompt and leaves."""
    request = Request("r", token_array(tokens), len(tokens), SamplingParams(), max_tokens=1)
    prefix = pool.get_cached_prefix(request)
    pool.allocate_known(request, prefix)
    pool.register(request, len(prefix), len(tokens) // BLOCK_SIZE)
    pool.free(request)


def packed(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(NAME_BYTES, "big") for number in numbers)


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=24)


@settings(deadline=None)
@given(st.lists(st.tuples(prompts, st.booleans(), st.booleans()), max_size=40))
def test_readers_know_what_the_pool_holds(steps: list[tuple[list[int], bool, bool]]) -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    pool.journal = PrefixJournal()
    held = PrefixIndex()
    early, late = PrefixFeed(held), None
    known, known_late = PrefixIndex(), PrefixIndex()
    for tokens, is_read, joins in steps:
        run_prompt(pool, tokens)
        changes = pool.journal.take()
        if changes is not None:
            held.change(changes)
            for feed in (early, late):
                if feed is not None:
                    feed.note(changes)
        if is_read and (update := early.take()) is not None:
            known.apply(update)
        if joins and late is None:
            late = PrefixFeed(held)
        if late is not None and (update := late.take()) is not None:
            known_late.apply(update)
    if (update := early.take()) is not None:
        known.apply(update)
    names = set(names_of(pool.held_hashes()))
    for index in (held, known):
        assert set(split_names(index.snapshot().changes.added)) == names
    if late is not None:
        assert set(split_names(known_late.snapshot().changes.added)) == names
    for tokens, _, _ in steps:
        full = names_of(hash_blocks(tokens, BLOCK_SIZE))
        expected = next((i for i, name in enumerate(full) if name not in names), len(full))
        assert known.longest_prefix(full) == expected


def test_a_router_names_blocks_as_the_engine_does() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    pool.journal = PrefixJournal()
    run_prompt(pool, list(range(12)))
    changes = pool.journal.take()
    assert changes is not None
    index = PrefixIndex()
    index.change(changes)
    assert index.longest_prefix(names_of(hash_blocks([*range(8), 99, 98, 97, 96], BLOCK_SIZE))) == 2
    assert pool.journal.take() is None


def test_a_block_that_came_and_went_is_told_as_gone() -> None:
    journal = PrefixJournal()
    journal.add(bytes(32))
    journal.remove(bytes(32))
    assert journal.take() == PrefixChanges(removed=bytes(8))


def test_the_first_message_is_a_snapshot_and_an_idle_one_says_nothing() -> None:
    held = PrefixIndex()
    held.change(PrefixChanges(packed(1, 2)))
    feed = PrefixFeed(held)
    feed.note(PrefixChanges(packed(3)))  # told by the snapshot
    first = feed.take()
    assert first is not None
    assert first.is_snapshot
    assert feed.take() is None
    feed.note(PrefixChanges(packed(4), packed(1)))
    second = feed.take()
    assert second is not None
    assert second.changes == PrefixChanges(packed(4), packed(1))
    assert not second.is_snapshot


def test_a_reader_that_falls_behind_gets_a_snapshot_not_a_backlog() -> None:
    held = PrefixIndex()
    feed = PrefixFeed(held)
    feed.take()
    for start in range(0, 10_000, 100):
        gone = packed(*range(start - 100, start)) if start else b""
        changes = PrefixChanges(packed(*range(start, start + 100)), gone)
        held.change(changes)
        feed.note(changes)
    update = feed.take()
    assert update is not None
    assert update.is_snapshot
    assert len(update.changes.added) == 100 * NAME_BYTES
