"""Who sits in which slot, and the blocks of each slot's request.

A *slot* belongs to a request from its first step until it leaves the batch; state that lives across steps (sampling
parameters, last sampled token, block table) is indexed by slot. Bookkeeping on the host; knows no torch.
"""

from __future__ import annotations

import numpy as np

from workers.request import Request


class SlotTable:
    """Slots of one engine and their block tables.

    Attributes:
        block_table_SM: int32 [max_num_seqs, max_blocks_per_seq]; columns beyond ``num_blocks`` are stale.
        num_blocks: Blocks known of each slot's request.
    """

    def __init__(self, max_num_seqs: int, max_blocks_per_seq: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.block_table_SM = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        self.num_blocks = [0] * max_num_seqs
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

    def update_blocks(self, request: Request, slot: int) -> None:
        """Take over the blocks that the request gained since the last call."""
        block_ids = request.block_ids
        known = self.num_blocks[slot]
        if len(block_ids) != known:
            self.block_table_SM[slot, known : len(block_ids)] = block_ids[known:]
            self.num_blocks[slot] = len(block_ids)
