"""An eager model on a CPU, with a recorded program in its place wherever that gives the same result.

Knows when a program applies: native attention, no padding, few tokens. Beyond that the kernels are long and what lies
between them does not matter.

Shape suffixes: T = tokens of the batch, E = hidden size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from workers.attention.base import PADDING_SLOT, AttentionBackend, BatchGeometry
from workers.attention.cpu import CpuMetadata, CpuPagedAttention
from workers.graphs.context import (
    ForwardContext,
    get_forward_context,
    is_forward_context_available,
    set_forward_context,
)
from workers.kernels.program import NativeProgram, ObstacleError

logger = logging.getLogger(__name__)

#: Most tokens of a step that a program runs. Its workspace is sized for them: a few MB.
MAX_PROGRAM_TOKENS = 512

#: Tokens of the recorded batch, and of the batches on which the program must equal the model to the bit.
_RECORDED_TOKENS = 2
_CHECKED_TOKENS = (1, 3)

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class CpuModel:
    """Calls a model, through a program wherever one applies.

    Args:
        model: Eager; ``(input_ids_T, positions_T)`` to hidden states ``[T, E]``, or ``[R, E]`` if the context says so.
        backend: Its attention.
        kv_caches: Per layer; a program is bound to them.
    """

    def __init__(self, model: Model, backend: AttentionBackend, kv_caches: Sequence[torch.Tensor]) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._program = self._make_program(backend) if isinstance(backend, CpuPagedAttention) else None

    def __call__(self, input_ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """See :meth:`workers.model.decoder.DecoderForCausalLM.forward`."""
        if self._program is not None and is_forward_context_available():
            context = get_forward_context()
            metadata, num_tokens = context.attn_metadata, input_ids_T.shape[0]
            if (
                isinstance(metadata, CpuMetadata)
                and context.kv_caches is self._kv_caches
                and metadata.geometry.num_tokens == num_tokens <= MAX_PROGRAM_TOKENS
            ):
                return self._program((input_ids_T, positions_T), metadata.step)
        return self._model(input_ids_T, positions_T)

    @property
    def has_program(self) -> bool:
        """Whether recording succeeded."""
        return self._program is not None

    def _make_program(self, backend: CpuPagedAttention) -> NativeProgram | None:
        """Record a batch that writes to no cache slot, and check the program on others."""
        started_s = time.perf_counter()
        inputs, context = self._dummy_batch(_RECORDED_TOKENS, backend)
        try:
            with set_forward_context(context):
                _, program = NativeProgram.record(self._model, inputs, context.attn_metadata.step, MAX_PROGRAM_TOKENS)
        except ObstacleError as obstacle:
            logger.info("the model runs without a native program: %s", obstacle)
            return None
        for num_tokens in _CHECKED_TOKENS:
            inputs, context = self._dummy_batch(num_tokens, backend)
            with set_forward_context(context):
                expected_TE = self._model(*inputs)
            actual_TE = program(inputs, context.attn_metadata.step)
            if not torch.equal(actual_TE.view(torch.uint8), expected_TE.view(torch.uint8)):
                logger.warning("the native program differs from the model it was recorded from, and is not used")
                return None
        logger.info("native program recorded and checked in %.2f s", time.perf_counter() - started_s)
        return program

    def _dummy_batch(
        self, num_tokens: int, backend: CpuPagedAttention
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ForwardContext]:
        """One request of ``num_tokens`` new tokens, all of them padding to the cache."""
        num_blocks = -(-num_tokens // backend.spec.block_size)
        starts, lengths = np.array([0, num_tokens], dtype=np.int32), np.array([num_tokens], dtype=np.int32)
        geometry = BatchGeometry(
            num_reqs=1,
            num_tokens=num_tokens,
            max_query_len=num_tokens,
            max_seq_len=num_tokens,
            query_start_loc_cpu=starts,
            seq_lens_cpu=lengths,
            query_start_loc=torch.from_numpy(starts),
            seq_lens=torch.from_numpy(lengths),
            block_table_RM=torch.zeros(1, num_blocks, dtype=torch.int32),
            slot_mapping_T=torch.full((num_tokens,), PADDING_SLOT, dtype=torch.int64),
        )
        positions_T = torch.arange(num_tokens)
        context = ForwardContext(backend, backend.build_metadata(geometry), self._kv_caches)
        return (positions_T.flip(0), positions_T), context
