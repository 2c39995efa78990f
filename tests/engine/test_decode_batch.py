"""Decode steps unpacked on the device: the same inputs as those that the host lays out, row by row."""

from __future__ import annotations

import random

import pytest
import torch

from workers.kernels.decode_buffers import DecodeBuffers, DecodeField
from workers.kernels.decode_inputs import unpack_decode, unpack_with_torch
from workers.request import Request, token_array
from workers.runner.decode_batch import DecodeBatch
from workers.runner.input_batch import InputBatch
from workers.runner.slots import SlotTable
from workers.sampling_params import SamplingParams
from workers.scheduler.output import ScheduledRequest, SchedulerOutput

MAX_SEQS, MAX_BLOCKS, BLOCK = 6, 8, 4
CPU = torch.device("cpu")


def make_request(name: str, num_tokens: int, rng: random.Random) -> Request:
    token_ids = token_array([rng.randrange(100) for _ in range(num_tokens)])
    request = Request(name, token_ids, max(num_tokens - 2, 1), SamplingParams(), 99)
    request.block_ids = rng.sample(range(1, 200), -(-num_tokens // BLOCK))
    return request


@pytest.mark.parametrize("seed", range(20))
def test_unpacked_steps_equal_steps_laid_out_by_the_host(seed: int) -> None:
    """Random lengths, requests that come, grow by a block, leave and are replaced in their slots, and padding."""
    rng = random.Random(seed)
    slots = SlotTable(MAX_SEQS, MAX_BLOCKS)
    host = InputBatch(slots, 64, BLOCK, CPU)
    decode = DecodeBatch(slots, host)
    live: list[Request] = []
    for step in range(12):
        full = [request.request_id for request in live if len(request.block_ids) == MAX_BLOCKS]
        dropped = full + [request.request_id for request in live if rng.random() < 0.2]
        live = [request for request in live if request.request_id not in dropped]
        slots.drop(dropped)
        while len(live) < MAX_SEQS and (not live or rng.random() < 0.5):
            live.append(make_request(f"{step}-{len(live)}", rng.randint(1, BLOCK * (MAX_BLOCKS - 3)), rng))
        seated = []
        for request in live:
            slot, is_new = slots.seat(request)
            seated.append(slot)
            if is_new:
                decode.forget(slot)
        scheduled = [ScheduledRequest(request, request.num_tokens - 1, 1, True) for request in live]
        output = SchedulerOutput(step, scheduled, len(scheduled))
        num_rows = rng.randint(len(live), MAX_SEQS)
        expected = host.prepare(output, seated, num_rows, num_rows)
        num_output_R = host.prepare_sampling(output, seated).num_output_R
        input_ids, positions = expected.input_ids_T.clone(), expected.positions_T.clone()
        actual, buffers = decode.prepare(output, seated, num_rows), decode.buffers
        geometry, wanted = actual.geometry, expected.geometry
        assert torch.equal(buffers.input_ids_R[:num_rows], input_ids)
        assert torch.equal(buffers.positions_R[:num_rows], positions)
        assert torch.equal(geometry.slot_mapping_T, wanted.slot_mapping_T)
        assert torch.equal(geometry.seq_lens, wanted.seq_lens)
        assert torch.equal(geometry.query_start_loc, wanted.query_start_loc)
        assert geometry.query_start_loc_cpu.tolist() == wanted.query_start_loc_cpu.tolist()
        assert geometry.seq_lens_cpu.tolist() == wanted.seq_lens_cpu.tolist()
        assert (geometry.max_seq_len, geometry.num_reqs) == (wanted.max_seq_len, wanted.num_reqs)
        assert torch.equal(buffers.num_output_R[: len(live)], num_output_R)
        assert buffers.slots_R[:num_rows].tolist() == seated + [MAX_SEQS] * (num_rows - len(live))
        for row, request in enumerate(live):
            assert geometry.block_table_RM[row, : len(request.block_ids)].tolist() == request.block_ids
        for request in live:
            request.token_ids.append(rng.randrange(100))
            if request.num_tokens > len(request.block_ids) * BLOCK:
                request.block_ids.append(rng.randrange(1, 200))


def test_tokens_that_the_host_does_not_know_come_from_their_slots() -> None:
    slots = SlotTable(MAX_SEQS, MAX_BLOCKS)
    decode = DecodeBatch(slots, InputBatch(slots, 64, BLOCK, CPU))
    decode.buffers.last_token_S[:] = torch.arange(MAX_SEQS + 1) + 50
    requests = [make_request(str(index), 5, random.Random(index)) for index in range(3)]
    seated = [slots.seat(request)[0] for request in requests]
    scheduled = [ScheduledRequest(request, 4 + (index == 1), 1, True) for index, request in enumerate(requests)]
    decode.prepare(SchedulerOutput(0, scheduled, 3), seated, 4)
    expected = [requests[0].token_ids[4], 50 + seated[1], requests[2].token_ids[4], 0]
    assert decode.buffers.input_ids_R[:4].tolist() == expected


def test_the_padding_slot_is_shared_and_nothing_of_it_is_read() -> None:
    slots = SlotTable(MAX_SEQS, MAX_BLOCKS)
    decode = DecodeBatch(slots, InputBatch(slots, 64, BLOCK, CPU))
    inputs = decode.prepare_dummy(4)
    assert inputs.table_RF[:, DecodeField.SLOT].tolist() == [MAX_SEQS] * 4
    assert decode.buffers.slot_mapping_R[:4].tolist() == [-1] * 4
    assert decode.buffers.seq_lens_R[:4].tolist() == [0] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("seed", range(10))
def test_the_kernel_does_what_torch_does(seed: int) -> None:
    rng = random.Random(seed)
    device, page, num_blocks = torch.device("cuda"), 16, 700

    def zeros(length: int) -> torch.Tensor:
        return torch.zeros(length, dtype=torch.int64, device=device)

    buffers = [DecodeBuffers.allocate(zeros(40), zeros(40), zeros(41), num_blocks) for _ in range(2)]
    for _ in range(5):
        num_real = rng.randint(1, 40)
        slots = rng.sample(range(40), num_real)
        rows = []
        for row, slot in enumerate(slots):
            position = rng.randrange(num_blocks * page)
            column = position // page if rng.random() < 0.5 else -1
            token = rng.randrange(1000) if rng.random() < 0.5 else -1
            rows.append((slot, position, token, rng.randrange(50), column, rng.randrange(1, 9999), row + 1, 0))
        rows += [(40, -1, 0, 0, -1, 0, num_real, 0)] * rng.randint(0, 40 - num_real)
        table = torch.tensor(rows, dtype=torch.int32, device=device)
        last_token = torch.randint(0, 1000, (41,), device=device)
        for each in buffers:
            each.last_token_S.copy_(last_token)
        unpack_decode(table, buffers[0], page)
        unpack_with_torch(table, buffers[1], page)
        for name in DecodeBuffers.__dataclass_fields__:
            ours, theirs = (getattr(each, name) for each in buffers)
            if name != "block_table_RM":
                assert torch.equal(ours, theirs), name
        for row, fields in enumerate(rows):
            used = max(fields[1], 0) // page + 1
            ours, theirs = (each.block_table_RM[row, :used] for each in buffers)
            assert torch.equal(ours, theirs)
