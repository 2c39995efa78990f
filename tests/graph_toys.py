"""A model of a few lines with everything that matters to graphs: pieces, an attention op between them that reads
its metadata from the forward context, a cache, persistent buffers, and a runner that pads.

It runs on any device in float64, so that padded, captured and eager runs can be compared closely. Attention is the
mean over the cached keys of a token's context: wrong slots, stale metadata or touched padding all change it.

Shape suffixes: T = tokens (padded), H = hidden, M = most tokens of a context, N = cache slots.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from workers.graphs import (
    BatchDescriptor,
    BatchHistogram,
    CapturePlan,
    CUDAGraphMode,
    CUDAGraphWrapper,
    ForwardContext,
    GraphBackend,
    GraphCounters,
    GraphDispatcher,
    GraphMemoryBudget,
    get_forward_context,
    set_forward_context,
)
from workers.graphs.capturer import GraphCapturer

HIDDEN = 16
VOCAB = 50
LAYERS = 3
CONTEXT = 24
SLOTS = 512


@dataclasses.dataclass
class Metadata:
    """Slots that each token writes to (-1: none) and reads from (-1: nothing), views of persistent buffers."""

    slot_mapping_T: torch.Tensor
    context_TM: torch.Tensor


class ToyModel:
    """Embedding, then per layer: attention over what the piece before made, and a piece after it."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device) / 4

        self.embedding_VH = weight(VOCAB, HIDDEN)
        self.mixers_LHH = [weight(HIDDEN, HIDDEN) for _ in range(LAYERS)]
        self.pieces: list[Callable[..., Any]] = [self.embed, *(self._mixer(layer) for layer in range(LAYERS))]

    def embed(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_TH = self.embedding_VH[token_ids_T] + positions_T[:, None].to(torch.float64) / CONTEXT
        return hidden_TH, torch.empty_like(hidden_TH)

    def _mixer(self, layer: int) -> Callable[..., Any]:
        weight_HH = self.mixers_LHH[layer]
        is_last = layer == LAYERS - 1

        def mix(hidden_TH: torch.Tensor, *, attended: dict[str, torch.Tensor]) -> Any:
            hidden_TH = torch.tanh((hidden_TH + attended["out_TH"]) @ weight_HH) + hidden_TH
            return hidden_TH @ self.embedding_VH.T if is_last else (hidden_TH, torch.empty_like(hidden_TH))

        return mix

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Logits, float64 [T, V]."""
        hidden_TH, out_TH = self.pieces[0](token_ids_T, positions_T)
        for layer in range(LAYERS):
            attend(layer, hidden_TH, out_TH)
            result = self.pieces[layer + 1](hidden_TH, attended={"out_TH": out_TH})
            if layer < LAYERS - 1:
                hidden_TH, out_TH = result
        assert isinstance(result, torch.Tensor)
        return result


def attend(layer: int, hidden_TH: torch.Tensor, out_TH: torch.Tensor) -> None:
    """The op between pieces: write keys to their slots, mean over each token's context into ``out_TH``."""
    context = get_forward_context()
    metadata: Metadata | None = context.attn_metadata
    if metadata is None:
        out_TH.zero_()
        return
    cache_NH = context.kv_caches[layer]
    cache_NH[metadata.slot_mapping_T] = hidden_TH  # slot -1 is the last row, which nothing reads
    is_read_TM = metadata.context_TM >= 0
    keys_TMH = cache_NH[metadata.context_TM] * is_read_TM[:, :, None]
    out_TH.copy_(keys_TMH.sum(1) / is_read_TM.sum(1, keepdim=True).clamp(min=1))


@dataclasses.dataclass
class ToyRequest:
    tokens: list[int]
    num_computed: int
    slots: list[int]


class ToyRunner:
    """Persistent buffers, padding, dispatch, and a capture plan around one model and one backend (or none)."""

    def __init__(
        self,
        device: torch.device,
        mode: CUDAGraphMode,
        sizes: list[int],
        max_num_seqs: int,
        *,
        backend: GraphBackend | None = None,
        query_len: int = 1,
        max_num_tokens: int = 64,
        first_sizes: Any = None,
        budget: GraphMemoryBudget | None = None,
        debug_graph_inputs: bool = True,
    ) -> None:
        self.device = device
        self.model = ToyModel(device)
        self.counters = GraphCounters()
        self.histogram = BatchHistogram()
        self.wrappers: list[CUDAGraphWrapper] = []
        self.forward: Callable[..., torch.Tensor] = self.model.forward
        self.caches_LNH = [torch.zeros(SLOTS + 1, HIDDEN, dtype=torch.float64, device=device) for _ in range(LAYERS)]
        self.token_ids_T = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.positions_T = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.slot_mapping_T = torch.full((max_num_tokens,), -1, dtype=torch.int64, device=device)
        self.context_TM = torch.full((max_num_tokens, CONTEXT), -1, dtype=torch.int64, device=device)
        self.dispatcher = GraphDispatcher(
            mode, sizes, max_num_seqs, query_len, counters=self.counters, traffic=self.histogram
        )
        self.budget = budget if budget is not None else GraphMemoryBudget()
        self.plan = CapturePlan(
            self.dispatcher.capture_order(), max_num_seqs, query_len, first_sizes=first_sizes, histogram=self.histogram
        )
        if backend is not None:
            self._wrap(mode, backend, debug_graph_inputs)
            self.capturer = GraphCapturer(backend, self.dispatcher, self.plan, self.budget, self.dummy_run)

    def _wrap(self, mode: CUDAGraphMode, backend: GraphBackend, debug_graph_inputs: bool) -> None:
        options: dict[str, Any] = {"debug_graph_inputs": debug_graph_inputs, "counters": self.counters}
        if mode.has_piecewise():
            pieces = [
                CUDAGraphWrapper(piece, CUDAGraphMode.PIECEWISE, backend, name=f"piece {index}", **options)
                for index, piece in enumerate(self.model.pieces)
            ]
            self.wrappers += pieces
            self.model.pieces = list(pieces)
        if mode.has_full():
            full = CUDAGraphWrapper(self.model.forward, CUDAGraphMode.FULL, backend, **options)
            self.wrappers.append(full)
            self.forward = full

    def dummy_run(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        """All rows padding."""
        self.slot_mapping_T.fill_(-1)
        self.context_TM.fill_(-1)
        self._run(mode, descriptor)

    def step(self, batch: list[tuple[ToyRequest, int]]) -> torch.Tensor:
        """Logits of every real token, float64 [num_tokens, V]; ``batch`` pairs requests with query lengths."""
        tokens, positions, slots, contexts = [], [], [], []
        for request, query_len in batch:
            for position in range(request.num_computed, request.num_computed + query_len):
                tokens.append(request.tokens[position])
                positions.append(position)
                slots.append(request.slots[position])
                contexts.append(request.slots[: position + 1])
        num_tokens = len(tokens)
        query_lens = {query_len for _, query_len in batch}
        uniform = query_lens.pop() if len(query_lens) == 1 else None
        mode, descriptor = self.dispatcher.dispatch(len(batch), num_tokens, uniform)
        self.token_ids_T[:num_tokens] = torch.tensor(tokens, dtype=torch.int64)
        self.positions_T[:num_tokens] = torch.tensor(positions, dtype=torch.int64)
        self.slot_mapping_T.fill_(-1)
        self.slot_mapping_T[:num_tokens] = torch.tensor(slots, dtype=torch.int64)
        self.context_TM.fill_(-1)
        for row, context in enumerate(contexts):
            self.context_TM[row, : len(context)] = torch.tensor(context, dtype=torch.int64)
        return self._run(mode, descriptor)[:num_tokens].clone()

    def _run(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> torch.Tensor:
        num = descriptor.num_tokens
        metadata = Metadata(self.slot_mapping_T[:num], self.context_TM[:num])
        context = ForwardContext(None, metadata, self.caches_LNH, mode, descriptor)
        with torch.inference_mode(), set_forward_context(context):
            return self.forward(self.token_ids_T[:num], self.positions_T[:num])


def random_batches(rng: random.Random, max_num_seqs: int, num_steps: int) -> Iterator[list[tuple[ToyRequest, int]]]:
    """Batches of an engine: prefill chunks and decodes of requests that come and go; greedy tokens are fixed."""
    free = list(range(SLOTS))
    live: list[ToyRequest] = []
    for _ in range(num_steps):
        while len(live) < max_num_seqs and rng.random() < 0.5:
            length = rng.randint(2, CONTEXT)
            slots = [free.pop() for _ in range(length)]
            live.append(ToyRequest([rng.randrange(VOCAB) for _ in range(length)], 0, slots))
        is_decode_step = rng.random() < 0.5
        batch = []
        for request in live:
            left = len(request.tokens) - request.num_computed
            batch.append((request, 1 if is_decode_step else rng.randint(1, min(left, 6))))
        if batch:
            yield batch
        for request, query_len in batch:
            request.num_computed += query_len
        for request in [r for r in live if r.num_computed == len(r.tokens)]:
            live.remove(request)
            free.extend(request.slots)
            rng.shuffle(free)
