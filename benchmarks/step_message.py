"""What the state and the prefix news in every step message cost: bytes on the wire, microseconds at either end.

Builds the messages of a decode step of 256 streams, with and without news, of a step that computed 8192 prompt tokens,
and a snapshot of a large cache; then measures hashing a prompt and finding its longest prefix. Ends in one JSON line.

    python benchmarks/step_message.py
"""

from __future__ import annotations

import json
import os
import pickle
import timeit
from collections.abc import Callable

from cluster.messages import PrefixUpdate, ReplicaState, StepMessage
from cluster.routing.prefix_index import PrefixFeed, PrefixIndex
from workers.outputs import TokenChunk
from workers.scheduler.block_hash import hash_blocks
from workers.scheduler.prefix_journal import NAME_BYTES, PrefixChanges, PrefixJournal, names_of

NUM_STREAMS = 256
#: Blocks of 16 tokens: 100,000 of them are 51 GB of KV cache for the Llama-1B shape.
NUM_CACHED = 100_000
SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))


def main() -> None:
    """Measure and print."""
    chunks = [TokenChunk(f"cmpl-{os.urandom(16).hex()}-0", [1234], " word") for _ in range(NUM_STREAMS)]
    state = ReplicaState(NUM_STREAMS, 12, 5000, 100_000, 9000, 30_000, 0, NUM_CACHED, 256, SIZES, True, 12345)
    decode = _changes(NUM_STREAMS // 16)  # a stream fills a block every 16 steps
    prefill = _changes(8192 // 16)
    index = PrefixIndex()
    index.change(PrefixChanges(os.urandom(NUM_CACHED * NAME_BYTES)))
    messages = {
        "decode, no news": StepMessage(chunks, state),
        "decode": StepMessage(chunks, state, PrefixUpdate(decode)),
        "prefill of 8192": StepMessage(chunks[:8], state, PrefixUpdate(prefill)),
        "snapshot of 100000": StepMessage([], state, index.snapshot()),
    }
    results: dict[str, dict[str, float]] = {}
    for name, message in messages.items():
        data = pickle.dumps(message, protocol=5)
        results[name] = {
            "bytes": len(data),
            "pickle_us": _us(lambda message=message: pickle.dumps(message, protocol=5)),
            "unpickle_us": _us(lambda data=data: pickle.loads(data)),
        }
    for name, changes in (("decode", decode), ("prefill of 8192", prefill)):
        results[name]["journal_us"] = _us(lambda changes=changes: _journal(changes))
        results[name]["replica_us"] = _us(lambda changes=changes: _note(index, changes))
        results[name]["ingress_us"] = _us(lambda changes=changes: index.apply(PrefixUpdate(changes)))
    prompt = list(range(4096))
    names = names_of(hash_blocks(prompt, 16))
    index.change(PrefixChanges(b"".join(names)))
    lookup = {
        "hash_4096_tokens_us": _us(lambda: names_of(hash_blocks(prompt, 16))),
        "find_4096_tokens_us": _us(lambda: index.longest_prefix(names)),
    }
    for name, row in results.items():
        print(f"{name:20}", row, flush=True)
    print(json.dumps({"benchmark": "step_message", "messages": results, **lookup}))


def _changes(num_blocks: int) -> PrefixChanges:
    """As many blocks come as go: a cache that is full."""
    return PrefixChanges(os.urandom(num_blocks * NAME_BYTES), os.urandom(num_blocks * NAME_BYTES))


def _journal(changes: PrefixChanges) -> None:
    journal = PrefixJournal()
    for start in range(0, len(changes.added), NAME_BYTES):
        journal.remove(changes.removed[start : start + NAME_BYTES])
        journal.add(changes.added[start : start + NAME_BYTES])
    journal.take()


def _note(index: PrefixIndex, changes: PrefixChanges) -> None:
    feed = PrefixFeed(index)
    feed._is_held = {}  # a reader that is up to date
    index.change(changes)
    feed.note(changes)
    feed.take()


def _us(function: Callable[[], object]) -> float:
    """Microseconds of a call: the best of five rounds of about 20 ms."""
    timer = timeit.Timer(function)
    number = max(1, int(0.02 / max(timer.timeit(1), 1e-7)))
    return round(min(timer.repeat(5, number)) / number * 1e6, 2)


if __name__ == "__main__":
    main()
