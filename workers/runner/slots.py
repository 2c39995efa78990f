"""Who sits in which slot, and the blocks of each slot's request.

A *slot* belongs to a request from its first step until it leaves the batch; state that lives across steps (sampling
parameters, last sampled token, block table) is indexed by slot. Bookkeeping on the host; knows no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from workers.request import Request


class SlotTable:
    """Slots of one engine and their block tables.

    Attributes:
        block_table_SM: int32 [max_num_seqs, max_blocks_per_seq]; columns beyond ``num_blocks`` are stale.
        num_blocks: int64 [max_num_seqs], blocks known of each slot's request.
    """

    def __init__(self, max_num_seqs: int, max_blocks_per_seq: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.block_table_SM = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self._slots: dict[str, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    @property
    def padding_slot(self) -> int:
        """The slot that all padding rows share: one beyond the real ones."""
        return self.max_num_seqs

    def drop(self, request_ids: list[str]) -> list[int]:
        """Free the slots of requests that left the batch; returns the slots. Unknown ids never had one."""
        slots = [self._slots.pop(request_id) for request_id in request_ids if request_id in self._slots]
        self._free.extend(slots)
        return slots

    def seat(self, request: Request) -> tuple[int, bool]:
        """The request's slot, and whether it is new to the batch."""
        slot = self._slots.get(request.request_id)
        if slot is not None:
            return slot, False
        assert self._free, "the scheduler put more requests into a step than max_num_seqs"
        slot = self._slots[request.request_id] = self._free.pop()
        self.num_blocks[slot] = 0
        return slot, True

    def find(self, requests: Iterable[Request]) -> list[int] | None:
        """The slots of requests that all have one; None if one of them is new to the batch."""
        slot_of = self._slots.get
        slots = [slot_of(request.request_id) for request in requests]
        return None if None in slots else cast("list[int]", slots)

    def update_blocks(self, requests: Sequence[Request], slots_R: npt.NDArray[np.int64]) -> None:
        """Take over the blocks that the requests gained since the last call."""
        num_blocks_R = np.fromiter((len(request.block_ids) for request in requests), np.int64, len(requests))
        known_R = self.num_blocks[slots_R]
        for row in np.flatnonzero(num_blocks_R != known_R).tolist():
            slot, known, block_ids = slots_R[row], known_R[row], requests[row].block_ids
            self.block_table_SM[slot, known : len(block_ids)] = block_ids[known:]
        self.num_blocks[slots_R] = num_blocks_R
