"""Chained hashes that name the content of a full KV block.

The KV of a block depends on its own tokens and on every token before them, so a block is named by
``H(name of the previous block, its token ids)``. Knows nothing about which blocks are held, or where: a
router that holds only a prompt computes the same names.

The hash is BLAKE2s with 256 bits: a collision would hand one user's KV to another, so Python's ``hash``
(64 bits, and easy to steer) will not do.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import deque
from collections.abc import Iterator, Sequence

from workers.request import token_array

#: Stands for the previous block of a sequence's first one.
ROOT_HASH = bytes(32)


def new_block_hashes(hashes: list[bytes], token_ids: array[int], block_size: int, num_blocks: int) -> Iterator[bytes]:
    """Name what ``hashes`` lacks of the first ``num_blocks`` full blocks of ``token_ids``, one by one.

    Nothing is hashed before it is asked for; then it is appended to ``hashes`` too. Tokens are hashed as little-endian
    uint32, so that names are the same on every machine. The message is ``32 + 4 * block_size`` bytes, so block sizes do
    not mix either.
    """
    start, stop = len(hashes) * block_size, num_blocks * block_size
    assert stop <= len(token_ids), "a block can be named only when all its tokens are known"
    ids = token_ids[start:stop]
    if sys.byteorder == "big":
        ids.byteswap()
    packed, num_bytes = ids.tobytes(), block_size * ids.itemsize
    parent = hashes[-1] if hashes else ROOT_HASH
    for offset in range(0, len(packed), num_bytes):
        parent = hashlib.blake2s(parent + packed[offset : offset + num_bytes]).digest()
        hashes.append(parent)
        yield parent


def extend_block_hashes(hashes: list[bytes], token_ids: array[int], block_size: int, num_blocks: int) -> None:
    """Append to ``hashes`` until it names the first ``num_blocks`` full blocks of ``token_ids``."""
    if len(hashes) < num_blocks:
        deque(new_block_hashes(hashes, token_ids, block_size, num_blocks), maxlen=0)


def hash_blocks(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Names of all full blocks of ``token_ids``, in order; 32 bytes each."""
    return list(new_block_hashes([], token_array(token_ids), block_size, len(token_ids) // block_size))
