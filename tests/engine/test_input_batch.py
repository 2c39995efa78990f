"""A step laid out by the host: what every token and every row gets, against the definition."""

from __future__ import annotations

import random

import pytest
import torch

from workers.attention.base import PADDING_SLOT
from workers.request import Request, token_array
from workers.runner.input_batch import InputBatch
from workers.runner.slots import SlotTable
from workers.sampling_params import SamplingParams
from workers.scheduler.output import ScheduledRequest, SchedulerOutput

MAX_SEQS, MAX_BLOCKS, BLOCK = 6, 8, 4


def make_share(name: str, rng: random.Random, *, is_decode: bool) -> ScheduledRequest:
    """A chunk of a prompt, or a decode whose token the host may not know yet."""
    num_known = rng.randint(1, BLOCK * MAX_BLOCKS - 1)
    token_ids = token_array([rng.randrange(2**31, 2**32) for _ in range(num_known)])
    request = Request(name, token_ids, rng.randint(1, num_known), SamplingParams(), 99)
    if is_decode:
        start, num_tokens = num_known - rng.randint(0, 1), 1
    else:
        start = rng.randrange(num_known)
        num_tokens = rng.randint(1, num_known - start)
    request.block_ids = rng.sample(range(1, 200), -(-(num_known + 1) // BLOCK))
    return ScheduledRequest(request, start, num_tokens, is_decode or start + num_tokens == num_known)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_its_id_position_and_slot(seed: int) -> None:
    rng = random.Random(seed)
    slots = SlotTable(MAX_SEQS, MAX_BLOCKS)
    batch = InputBatch(slots, MAX_SEQS * MAX_BLOCKS * BLOCK, BLOCK, torch.device("cpu"))
    batch.last_token_S[:] = torch.arange(MAX_SEQS + 1) + 50
    num_decodes, count = rng.randint(0, 3), rng.randint(3, MAX_SEQS)
    shares = [make_share(str(row), rng, is_decode=row < num_decodes) for row in range(count)]
    for share in rng.sample(shares, count):
        slots.seat(share.request)
    seats = [slots.seat(share.request)[0] for share in shares]
    output = SchedulerOutput(0, shares, sum(share.num_tokens for share in shares))
    num_padded = output.num_tokens + rng.randint(0, 3)
    inputs = batch.prepare(output, seats, num_padded, MAX_SEQS)
    geometry = inputs.geometry

    ids, positions, cache_slots = [], [], []
    for share, seat in zip(shares, seats, strict=True):
        request = share.request
        for position in range(share.num_computed_tokens, share.num_computed_tokens + share.num_tokens):
            ids.append(request.token_ids[position] if position < request.num_tokens else 50 + seat)
            positions.append(position)
            cache_slots.append(request.block_ids[position // BLOCK] * BLOCK + position % BLOCK)
    padding = num_padded - output.num_tokens
    assert inputs.input_ids_T.tolist() == ids + [0] * padding
    assert inputs.positions_T.tolist() == positions + [0] * padding
    assert geometry.slot_mapping_T.tolist() == cache_slots + [PADDING_SLOT] * padding
    ends = [sum(share.num_tokens for share in shares[: row + 1]) for row in range(count)]
    assert geometry.query_start_loc.tolist() == [0, *ends] + [ends[-1]] * (MAX_SEQS - count)

    rows = batch.prepare_sampling(output, seats)
    sampled = [row for row, share in enumerate(shares) if share.samples]
    assert rows.requests == [shares[row].request for row in sampled]
    assert rows.slots == rows.slots_R.tolist() == [seats[row] for row in sampled]
    assert (list(range(count)) if rows.rows_R is None else rows.rows_R.tolist()) == sampled
    assert geometry.last_rows().tolist() == [end - 1 for end in ends]
    assert rows.num_output_R.tolist() == [
        shares[row].num_computed_tokens + shares[row].num_tokens - shares[row].request.num_prompt_tokens
        for row in sampled
    ]
