"""Paged batches for tests, laid out as the runner lays them out, and a dense reference to hold them against.

Shape suffixes as in ``workers.attention.base``.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from workers.attention.base import PADDING_SLOT, AttentionBackend, BatchGeometry
from workers.graphs.context import ForwardContext, set_forward_context
from workers.model.decoder import DecoderForCausalLM

CPU = torch.device("cpu")

#: Parameters of a test that runs on a CPU and, where there is one, on a GPU.
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


def make_geometry(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    *,
    num_padding_tokens: int = 0,
    num_padding_reqs: int = 0,
    device: torch.device = CPU,
) -> BatchGeometry:
    """A batch whose request r brings ``query_lens[r]`` tokens, the last of ``seq_lens[r]``."""
    num_reqs, num_tokens = len(query_lens), sum(query_lens)
    starts = np.zeros(num_reqs + num_padding_reqs + 1, np.int32)
    starts[1 : num_reqs + 1] = np.cumsum(query_lens)
    starts[num_reqs + 1 :] = num_tokens
    lengths = np.zeros(num_reqs + num_padding_reqs, np.int32)
    lengths[:num_reqs] = seq_lens
    table = np.zeros((num_reqs + num_padding_reqs, max(map(len, block_tables)) + 1), np.int32)
    slots = [PADDING_SLOT] * (num_tokens + num_padding_tokens)
    row = 0
    for request, blocks in enumerate(block_tables):
        table[request, : len(blocks)] = blocks
        for position in range(seq_lens[request] - query_lens[request], seq_lens[request]):
            slots[row] = blocks[position // block_size] * block_size + position % block_size
            row += 1
    return BatchGeometry(
        num_reqs=num_reqs,
        num_tokens=num_tokens,
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        query_start_loc_cpu=starts,
        seq_lens_cpu=lengths,
        query_start_loc=torch.from_numpy(starts).to(device, copy=True),
        seq_lens=torch.from_numpy(lengths).to(device, copy=True),
        block_table_RM=torch.from_numpy(table).to(device, copy=True),
        slot_mapping_T=torch.tensor(slots, dtype=torch.int64, device=device),
    )


def shuffled_block_tables(
    seq_lens: Sequence[int], block_size: int, num_blocks: int, rng: random.Random
) -> list[list[int]]:
    """Distinct blocks, in random order, for every request."""
    free = list(range(num_blocks))
    rng.shuffle(free)
    return [[free.pop() for _ in range(-(-length // block_size))] for length in seq_lens]


def dense_attention(
    q_NHD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Attention of the last N positions of a context of L, written out in fp64."""
    num_queries, context_len = q_NHD.shape[0], k_LKD.shape[0]
    group_size = q_NHD.shape[1] // k_LKD.shape[1]
    k_LHD, v_LHD = (x.double().repeat_interleave(group_size, dim=1) for x in (k_LKD, v_LKD))
    scores_HNL = torch.einsum("nhd,lhd->hnl", q_NHD.double(), k_LHD) * scale
    query_N1 = torch.arange(context_len - num_queries, context_len, device=q_NHD.device)[:, None]
    key_L = torch.arange(context_len, device=q_NHD.device)
    seen_NL = key_L <= query_N1
    if window is not None:
        seen_NL &= query_N1 - key_L < window
    weights_HNL = scores_HNL.masked_fill(~seen_NL, float("-inf")).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights_HNL, v_LHD)


@dataclasses.dataclass
class _Sequence:
    blocks: list[int] = dataclasses.field(default_factory=list)
    length: int = 0


class PagedSession:
    """Runs a model step by step over a paged cache whose blocks are handed out in random order.

    The cache starts as NaN, so that reading a slot that nobody wrote shows.
    """

    def __init__(
        self,
        model: DecoderForCausalLM,
        backend: AttentionBackend,
        *,
        num_blocks: int = 64,
        seed: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self.model = model
        self.backend = backend
        self.device = device
        shape = backend.kv_cache_shape(num_blocks)
        self.kv_caches = [
            torch.full(shape, float("nan"), dtype=backend.spec.dtype, device=device)
            for _ in range(model.config.num_hidden_layers)
        ]
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)
        self._sequences: dict[str, _Sequence] = {}

    @torch.inference_mode()
    def step(
        self, chunks: Mapping[str, Sequence[int]], *, num_padding_tokens: int = 0, num_padding_reqs: int = 0
    ) -> dict[str, torch.Tensor]:
        """Append each request's tokens; returns fp32 logits [new tokens, V] by request."""
        block_size = self.backend.spec.block_size
        positions: list[int] = []
        for key, tokens in chunks.items():
            sequence = self._sequences.setdefault(key, _Sequence())
            positions += range(sequence.length, sequence.length + len(tokens))
            sequence.length += len(tokens)
            while len(sequence.blocks) * block_size < sequence.length:
                sequence.blocks.append(self._free.pop())
        sequences = [self._sequences[key] for key in chunks]
        geometry = make_geometry(
            [len(tokens) for tokens in chunks.values()],
            [sequence.length for sequence in sequences],
            [sequence.blocks for sequence in sequences],
            block_size,
            num_padding_tokens=num_padding_tokens,
            num_padding_reqs=num_padding_reqs,
            device=self.device,
        )
        padding = [0] * num_padding_tokens
        input_ids = [token for tokens in chunks.values() for token in tokens]
        context = ForwardContext(self.backend, self.backend.build_metadata(geometry), self.kv_caches)
        with set_forward_context(context):
            hidden_TE = self.model(
                torch.tensor(input_ids + padding, device=self.device),
                torch.tensor(positions + padding, device=self.device),
            )
        assert hidden_TE.isfinite().all(), "padding rows must stay finite"
        logits_NV = self.model.compute_logits(hidden_TE[: len(input_ids)])
        parts = torch.split(logits_NV.cpu(), [len(tokens) for tokens in chunks.values()])
        return dict(zip(chunks, parts, strict=True))
