"""The paged KV cache's bookkeeping: which physical block holds what, and who holds it.

Knows block ids, reference counts and block hashes. Knows neither tensors nor the order in which requests are
served: deciding who gets a block is the scheduler's business.

A block is in exactly one of three places: held by one or more requests (reference count above 0), free with
content worth keeping (its hash is registered; evicted least recently used first), or free and empty. Empty
blocks are handed out before any cached content is evicted.

Block 0 is the null block. It is never handed out and never written, so a block table may point its padding
there, and whatever reads the padding reads finite memory that belongs to nobody.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from workers.request import Request
from workers.scheduler.block_hash import extend_block_hashes, new_block_hashes
from workers.scheduler.prefix_journal import PrefixJournal

#: Where padding of a block table points.
NULL_BLOCK = 0


class BlockPool:
    """Allocates, shares and caches the KV blocks of one engine.

    Args:
        num_blocks: Physical blocks, the null block included.
        block_size: Tokens per block.
        enable_prefix_caching: Keep the content of full blocks and find it again by hash.

    Attributes:
        journal: Notes which content comes and goes; None while nobody follows.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        assert num_blocks >= 2, "the pool needs a block besides the null block"
        assert block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.journal: PrefixJournal | None = None
        #: Tokens looked up in, and found in, the prefix cache. Recomputation after preemption does not count.
        self.num_query_tokens = 0
        self.num_hit_tokens = 0
        self._ref_counts = array("I", bytes(4 * num_blocks))
        self._ref_counts[NULL_BLOCK] = 1
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Popped from the end; inserted in reverse, so that low ids go first.
        self._free_empty: dict[int, None] = dict.fromkeys(range(num_blocks - 1, NULL_BLOCK, -1))
        # An OrderedDict pops its oldest entry in O(1); a plain dict would scan over deleted ones.
        self._free_cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that requests can hold: all but the null block."""
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds, cached ones included."""
        return len(self._free_empty) + len(self._free_cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks, held or free, whose content can be found by hash."""
        return len(self._block_of)

    def held_hashes(self) -> frozenset[bytes]:
        """Hashes of every block whose content is here."""
        return frozenset(self._block_of)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that cover ``num_tokens`` positions."""
        return -(-num_tokens // self.block_size)

    def get_cached_prefix(self, request: Request) -> list[int]:
        """Blocks whose content is the request's longest cached prefix, in order of position.

        At least the last known token is left out, since sampling needs its logits. Takes no reference:
        allocate before anything else touches the pool.
        """
        if not self._reads_cache(request):
            return []
        num_blocks = (request.num_tokens - 1) // self.block_size
        known = request.block_hashes[:num_blocks]
        # Hashed only as far as the cache reaches.
        new = new_block_hashes(request.block_hashes, request.token_ids, self.block_size, num_blocks)
        found = []
        for block_hash in itertools.chain(known, new):
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_free_blocks_taken(self, request: Request, cached_prefix: Sequence[int]) -> int:
        """By how much :meth:`allocate_known` with this prefix would shrink ``num_free_blocks``."""
        num_shared = sum(1 for block_id in cached_prefix if self._ref_counts[block_id] > 0)
        return self.num_blocks_for(request.num_tokens) - num_shared

    def allocate_known(self, request: Request, cached_prefix: Sequence[int]) -> None:
        """Give a request without blocks its cached prefix, and new blocks for its other known tokens."""
        assert not request.block_ids, f"{request.request_id} holds blocks already"
        num_new = self.num_blocks_for(request.num_tokens) - len(cached_prefix)
        # References first: taking an empty block may evict cached ones.
        for block_id in cached_prefix:
            if self._ref_counts[block_id] == 0:
                del self._free_cached[block_id]
            self._ref_counts[block_id] += 1
        request.block_ids = [*cached_prefix, *(self._take() for _ in range(num_new))]
        if request.num_preemptions == 0 and self._reads_cache(request):
            self.num_query_tokens += request.num_tokens
            self.num_hit_tokens += len(cached_prefix) * self.block_size

    def append_block(self, request: Request) -> None:
        """Give the request one more block; the caller has seen that one is free."""
        request.block_ids.append(self._take())

    def free(self, request: Request) -> None:
        """Take back all of the request's blocks; cached content stays until they are handed out again."""
        block_ids, request.block_ids = request.block_ids, []
        ref_counts, hash_of = self._ref_counts, self._hash_of
        # Last block first, so that the least shareable end of the sequence is evicted first.
        for block_id in reversed(block_ids):
            count = ref_counts[block_id] - 1
            assert count >= 0, f"block {block_id} was freed twice"
            ref_counts[block_id] = count
            if count == 0:
                place = self._free_empty if hash_of[block_id] is None else self._free_cached
                place[block_id] = None

    def name_blocks(self, request: Request, stop: int) -> None:
        """Hash blocks up to ``stop - 1`` of the request, so that :meth:`register` need not."""
        if self.enable_prefix_caching:
            extend_block_hashes(request.block_hashes, request.token_ids, self.block_size, stop)

    def register(self, request: Request, start: int, stop: int) -> None:
        """Make blocks ``start`` to ``stop - 1`` of the request findable; their KV must have been computed.

        Content that is already findable in another block (two requests computed it at once) stays there.
        """
        if not self.enable_prefix_caching:
            return
        extend_block_hashes(request.block_hashes, request.token_ids, self.block_size, stop)
        hash_of, block_of, journal = self._hash_of, self._block_of, self.journal
        for block_id, block_hash in zip(request.block_ids[start:stop], request.block_hashes[start:stop], strict=True):
            assert hash_of[block_id] is None, f"block {block_id} was written while it was cached"
            if block_of.setdefault(block_hash, block_id) == block_id:
                hash_of[block_id] = block_hash
                if journal is not None:
                    journal.add(block_hash)

    def check_integrity(self, live_requests: Iterable[Request]) -> None:
        """Account for every block: held as often as counted, or free once.

        Costs a scan of the reference counts in C plus time linear in the blocks held.

        Raises:
            AssertionError: A block leaked, was freed twice, or is shared without being counted.
        """
        held = Counter(itertools.chain.from_iterable(request.block_ids for request in live_requests))
        for problem in self._problems(held):
            raise AssertionError(f"block pool: {problem}")

    def _problems(self, held: Counter[int]) -> Iterable[str]:
        if NULL_BLOCK in held or self._ref_counts[NULL_BLOCK] != 1:
            yield "the null block was handed out"
        for block_id, count in held.items():
            if self._ref_counts[block_id] != count:
                yield f"block {block_id} has {count} holders but a count of {self._ref_counts[block_id]}"
            if block_id in self._free_empty or block_id in self._free_cached:
                yield f"block {block_id} is held and free"
        num_counted = int(np.count_nonzero(np.frombuffer(self._ref_counts, np.uint32))) - 1
        if num_counted != len(held):
            yield f"{num_counted} blocks are counted as held, {len(held)} are"
        if self.num_free_blocks + len(held) != self.num_usable_blocks:
            yield f"{self.num_free_blocks} free and {len(held)} held blocks are not {self.num_usable_blocks}"
        num_held_cached = sum(self._hash_of[block_id] is not None for block_id in held)
        if len(self._block_of) != num_held_cached + len(self._free_cached):
            yield (
                f"{len(self._block_of)} hashes are registered, but {num_held_cached} held and "
                f"{len(self._free_cached)} free blocks are cached"
            )

    def _reads_cache(self, request: Request) -> bool:
        # Logprobs of prompt tokens need the forward pass that a cache hit would skip.
        return self.enable_prefix_caching and request.params.prompt_logprobs is None

    def _take(self) -> int:
        """A free block, now with one reference: an empty one, else the least recently used cached one."""
        if self._free_empty:
            block_id, _ = self._free_empty.popitem()
        else:
            assert self._free_cached, "no free block; the caller checks num_free_blocks first"
            block_id, _ = self._free_cached.popitem(last=False)
            block_hash = self._hash_of[block_id]
            assert block_hash is not None
            del self._block_of[block_hash]
            self._hash_of[block_id] = None
            if self.journal is not None:
                self.journal.remove(block_hash)
        self._ref_counts[block_id] = 1
        return block_id
