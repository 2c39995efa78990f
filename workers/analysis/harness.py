"""A model with its attention, KV cache and input buffers, and nothing else of an engine: for running chosen batches.

Puts the compile layer and the graph layer around the model as the runner does, and lays batches out as it does, in
persistent buffers that captured graphs can read. Knows nothing about scheduling, sampling or time.

Shape suffixes: T = tokens of the (padded) batch, R = requests, M = most blocks of a request, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch

from workers.artifacts.library import ArtifactLibrary
from workers.attention.base import PADDING_SLOT, AttentionBackend, BatchGeometry
from workers.attention.selector import make_backend
from workers.checkpoint.resolve import resolve_model
from workers.compile.model import CompiledModel, compile_model
from workers.compile.stitch import WrapPiece
from workers.config import CompilationConfig, EngineConfig
from workers.graphs import BatchDescriptor, CUDAGraphMode, ForwardContext, set_forward_context
from workers.graphs.backends.base import GraphBackend
from workers.graphs.backends.factory import make_graph_backend
from workers.model.config import ModelConfig
from workers.model.loader import load_model
from workers.runner.device import resolve_device, resolve_dtype
from workers.runner.kv_cache import allocate_kv_caches

#: Runs a forward pass: ``(input_ids_T, positions_T)`` to hidden states or logits.
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """One request's share of a batch: ``num_tokens`` new tokens after ``num_cached`` cached ones."""

    num_tokens: int
    num_cached: int


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A batch in the harness' buffers.

    Attributes:
        geometry: For attention; its device tensors are views of persistent buffers.
        num_tokens: Real tokens; later rows are padding.
        used_blocks: KV blocks of its requests.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    geometry: BatchGeometry
    num_tokens: int
    used_blocks: list[int]


class ModelHarness:
    """See the module.

    Args:
        config: Of the engine.
        max_context: Most tokens of a request in a batch.
        attention: Makes the attention backend; None makes the config's.
        graph_backend: Records and replays; None takes the device's own.

    Attributes:
        kv_caches: Per layer. Block 0 belongs to nobody.

    Raises:
        ConfigError: As an engine's start.
        ModelError: As an engine's start.
    """

    @torch.inference_mode()
    def __init__(
        self,
        config: EngineConfig,
        max_context: int,
        *,
        attention: type[AttentionBackend] | None = None,
        graph_backend: GraphBackend | None = None,
    ) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.device = resolve_device(config.device)
        folder = resolve_model(config.model)
        model_config = ModelConfig.from_folder(folder)
        dtype = resolve_dtype(config.dtype, model_config, self.device)
        self.max_context = min(max_context, config.max_model_len or model_config.max_position_embeddings)
        self.model = load_model(
            folder, model_config, dtype, self.device, config.load_format, config.seed, max_model_len=self.max_context
        )
        make = functools.partial(make_backend, config.attention_backend) if attention is None else attention
        self.attention: AttentionBackend = make(self.model.attention_spec(config.block_size), self.device)
        self.blocks_per_seq = -(-self.max_context // config.block_size)
        self.num_blocks = config.max_num_seqs * self.blocks_per_seq + 2
        self.kv_caches = allocate_kv_caches(
            self.attention, model_config.num_hidden_layers, self.num_blocks, self.device
        )
        self.graph_backend = graph_backend or make_graph_backend(self.device)
        self._library = ArtifactLibrary.in_memory()
        self._buffers = _Buffers(config, self.blocks_per_seq, self.device)
        self._captured_on: list[ForwardContext] = []

    def compiled(self, config: CompilationConfig, wrap_piece: WrapPiece | None = None) -> CompiledModel:
        """The model compiled as ``config`` says; see :func:`workers.compile.model.compile_model`."""
        example = torch.zeros(2, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            return compile_model(
                self.model,
                config,
                {"input_ids_T": example, "positions_T": example.clone()},
                wrap_piece=wrap_piece,
                library=self._library,
                splitting_ops=self.attention.splitting_ops,
            )

    def decode_logits(self, forward: Forward) -> Forward:
        """A decode step as a full graph holds it: the forward pass, and logits ``[T, V]`` of every row."""
        return lambda input_ids_T, positions_T: self.model.compute_logits(forward(input_ids_T, positions_T))

    @torch.inference_mode()
    def run(
        self,
        forward: Callable[[torch.Tensor, torch.Tensor], Result],
        batch: Batch,
        mode: CUDAGraphMode = CUDAGraphMode.NONE,
        descriptor: BatchDescriptor | None = None,
        *,
        is_capture: bool = False,
    ) -> Result:
        """One forward pass in a forward context of its own; see :meth:`context`."""
        with self.context(batch.geometry, mode, descriptor, is_capture=is_capture):
            return forward(batch.input_ids_T, batch.positions_T)

    def context(
        self,
        geometry: BatchGeometry,
        mode: CUDAGraphMode,
        descriptor: BatchDescriptor | None,
        *,
        is_capture: bool = False,
    ) -> AbstractContextManager[ForwardContext]:
        """What attention and graphs need to know of a batch, while the model runs on it.

        Args:
            is_capture: Keep it: the graph of a backend that is not fit for one reads its metadata for ever, and would
                take any address from memory that had found another use, and the device down.
        """
        metadata = self.attention.build_metadata(geometry)
        context = ForwardContext(self.attention, metadata, self.kv_caches, mode, descriptor)
        if is_capture:
            self._captured_on.append(context)
        return set_forward_context(context)

    def capture(
        self,
        forward: Callable[[torch.Tensor, torch.Tensor], Any],
        mode: CUDAGraphMode,
        descriptor: BatchDescriptor,
        batch: Batch | None = None,
    ) -> None:
        """Warm up and capture, on padding rows only as the runner does, or on a batch of the caller's.

        Raises:
            Exception: Whatever the capture raises.
        """
        if batch is None:
            batch = self.padding_batch(descriptor)
        with self.graph_backend.capturing(clean_up=False):
            self.run(forward, batch, CUDAGraphMode.NONE, descriptor)
            self.run(forward, batch, mode, descriptor, is_capture=True)

    @torch.inference_mode()
    def padding_batch(self, descriptor: BatchDescriptor) -> Batch:
        """A batch without a single request, as captures are made on."""
        num_reqs = descriptor.num_reqs or 1
        return self._buffers.write([], descriptor.num_tokens, num_reqs, max_query_len=1 if descriptor.uniform else 2)

    @torch.inference_mode()
    def batch(self, chunks: Sequence[Chunk], descriptor: BatchDescriptor, seed: int = 0) -> Batch:
        """Write a batch of random tokens into the buffers, padded to ``descriptor``; it is valid until the next one.

        Args:
            chunks: Decodes first, as the scheduler orders them; at least one.
        """
        generator = random.Random(seed)
        blocks = list(range(1, self.num_blocks))
        generator.shuffle(blocks)
        vocab_size, block_size = self.model.config.vocab_size, self.config.block_size
        rows = []
        for chunk in chunks:
            length = chunk.num_cached + chunk.num_tokens
            assert length <= self.max_context
            tokens = [generator.randrange(vocab_size) for _ in range(chunk.num_tokens)]
            rows.append(_Row(chunk, tokens, [blocks.pop() for _ in range(-(-length // block_size))]))
        longest = max(chunk.num_tokens for chunk in chunks)
        num_reqs = len(chunks) if descriptor.num_reqs is None else descriptor.num_reqs
        return self._buffers.write(rows, descriptor.num_tokens, num_reqs, max_query_len=longest)


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    chunk: Chunk
    tokens: list[int]
    blocks: list[int]


class _Buffers:
    """Persistent inputs: the same addresses for every batch."""

    def __init__(self, config: EngineConfig, blocks_per_seq: int, device: torch.device) -> None:
        self._block_size = config.block_size
        num_tokens = max(config.max_num_batched_tokens, config.max_num_seqs)

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._input_ids_T = zeros(num_tokens, dtype=torch.int64)
        self._positions_T = zeros(num_tokens, dtype=torch.int64)
        self._slot_mapping_T = zeros(num_tokens, dtype=torch.int64)
        self._query_start_loc = zeros(config.max_num_seqs + 1, dtype=torch.int32)
        self._seq_lens = zeros(config.max_num_seqs, dtype=torch.int32)
        self._block_table_RM = zeros(config.max_num_seqs, blocks_per_seq, dtype=torch.int32)

    def write(self, rows: Sequence[_Row], num_tokens: int, num_reqs: int, max_query_len: int) -> Batch:
        ids = np.zeros(num_tokens, np.int64)
        positions = np.zeros(num_tokens, np.int64)
        slots = np.full(num_tokens, PADDING_SLOT, np.int64)
        starts, lengths = np.zeros(num_reqs + 1, np.int32), np.zeros(num_reqs, np.int32)
        table = np.zeros((num_reqs, self._block_table_RM.shape[1]), np.int32)
        token = 0
        for index, row in enumerate(rows):
            end = token + row.chunk.num_tokens
            where = np.arange(row.chunk.num_cached, row.chunk.num_cached + row.chunk.num_tokens)
            ids[token:end], positions[token:end] = row.tokens, where
            table[index, : len(row.blocks)] = row.blocks
            slots[token:end] = table[index, where // self._block_size] * self._block_size + where % self._block_size
            starts[index + 1], lengths[index] = end, where[-1] + 1
            token = end
        starts[len(rows) + 1 :] = token
        geometry = BatchGeometry(
            num_reqs=len(rows),
            num_tokens=token,
            max_query_len=max_query_len,
            max_seq_len=max(int(lengths.max(initial=0)), max_query_len),
            query_start_loc_cpu=starts,
            seq_lens_cpu=lengths,
            query_start_loc=_fill(self._query_start_loc, starts),
            seq_lens=_fill(self._seq_lens, lengths),
            block_table_RM=_fill(self._block_table_RM, table),
            slot_mapping_T=_fill(self._slot_mapping_T, slots),
        )
        used = [block for row in rows for block in row.blocks]
        return Batch(_fill(self._input_ids_T, ids), _fill(self._positions_T, positions), geometry, token, used)


def _fill(buffer: torch.Tensor, values: np.ndarray[Any, Any]) -> torch.Tensor:
    """Write into the head of a persistent buffer; returns the view."""
    view = buffer[: len(values)]
    view.copy_(torch.from_numpy(values))
    return view
