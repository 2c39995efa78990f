"""Chained hashes that name the content of a full KV block.

The KV of a block depends on its own tokens and on every token before them, so a block is named by
``H(name of the previous block, its token ids)``. Knows nothing about which blocks are held, or where: a
router that holds only a prompt computes the same names.

The hash is BLAKE2s with 256 bits: a collision would hand one user's KV to another, so Python's ``hash``
(64 bits, and easy to steer) will not do.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

#: Stands for the previous block of a sequence's first one.
ROOT_HASH = bytes(32)

_BYTES_PER_TOKEN = 4


def extend_block_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int, num_blocks: int) -> None:
    """Append to ``hashes`` until it names the first ``num_blocks`` full blocks of ``token_ids``.

    Token ids are packed as little-endian uint32, so that names are the same on every machine. The message
    hashed is ``32 + 4 * block_size`` bytes, so block sizes do not mix either.
    """
    start, stop = len(hashes) * block_size, num_blocks * block_size
    if start >= stop:
        return
    assert stop <= len(token_ids), "a block can be named only when all its tokens are known"
    packed = struct.pack(f"<{stop - start}I", *token_ids[start:stop])
    parent = hashes[-1] if hashes else ROOT_HASH
    num_bytes = block_size * _BYTES_PER_TOKEN
    for offset in range(0, len(packed), num_bytes):
        parent = hashlib.blake2s(parent + packed[offset : offset + num_bytes]).digest()
        hashes.append(parent)


def hash_blocks(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Names of all full blocks of ``token_ids``, in order; 32 bytes each."""
    hashes: list[bytes] = []
    extend_block_hashes(hashes, token_ids, block_size, len(token_ids) // block_size)
    return hashes
