"""The reference backend: paged attention on ``scaled_dot_product_attention``, wherever torch runs.

Knows how to read a context through its block table: all decodes of a batch in one call, prefills one by one.
It gathers the context into contiguous memory first, which is simple and right, and not fast; other backends
are judged against it.

Shape suffixes: T = tokens of the batch (padded), N = query tokens of one request, R = decoding requests,
L = context length (of the longest), H = query heads, K = KV heads, G = H / K query heads per KV head,
D = head size, S = block size, B = physical blocks.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.attention.base import AttentionBackend, BatchGeometry
from workers.modes import AttentionCGSupport


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeBatch:
    """The requests at the head of the batch that bring one token each.

    Attributes:
        num_reqs: R; their tokens are rows 0 .. R - 1.
        slots: int64 [R * L] cache slot of every key; past the end of a context its last key stands in, so
            that no unwritten memory is read.
        mask_R11L: Added to the scores, 0 or -inf; None if every context is L long and no window applies.
    """

    num_reqs: int
    slots: torch.Tensor
    mask_R11L: torch.Tensor | None


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
    """One request that brings several tokens.

    Attributes:
        tokens: Its rows of the batch.
        slots_L: int64 cache slot of every key that one of its queries sees.
        mask_NL: True where a query sees a key; None for plain causal attention over its own tokens only.
    """

    tokens: slice
    slots_L: torch.Tensor
    mask_NL: torch.Tensor | None


@dataclasses.dataclass(frozen=True, slots=True)
class SdpaMetadata:
    """One step, ready for every layer.

    Attributes:
        num_tokens: Real tokens; later rows are padding.
        rows: Tokens that are written to the cache, or None for all ``num_tokens``.
        slots: int64 destination of each of them.
    """

    num_tokens: int
    rows: torch.Tensor | None
    slots: torch.Tensor
    decodes: DecodeBatch | None
    prefills: tuple[Prefill, ...]


class SdpaPagedAttention(AttentionBackend):
    """Reference backend. Its shapes follow the longest context, so it cannot be part of a captured graph."""

    name = "sdpa"
    cudagraph_support = AttentionCGSupport.NEVER

    def build_metadata(self, geometry: BatchGeometry) -> SdpaMetadata:
        """Plan the step from the host's lengths; waits for the device only to find padding slots."""
        slots = geometry.slot_mapping_T[: geometry.num_tokens]
        written = torch.nonzero(slots >= 0).flatten()
        all_written = written.numel() == geometry.num_tokens
        starts = geometry.query_start_loc_cpu[: geometry.num_reqs + 1]
        query_lens = (starts[1:] - starts[:-1]).tolist()
        num_decodes = next((i for i, length in enumerate(query_lens) if length != 1), len(query_lens))
        return SdpaMetadata(
            num_tokens=geometry.num_tokens,
            rows=None if all_written else written,
            slots=slots if all_written else slots[written],
            decodes=self._plan_decodes(geometry, num_decodes) if num_decodes else None,
            prefills=tuple(
                self._plan_prefill(geometry, request)
                for request in range(num_decodes, geometry.num_reqs)
                if query_lens[request]
            ),
        )

    def forward(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: SdpaMetadata,
        out_THD: torch.Tensor,
    ) -> None:
        """See the interface; padding rows of ``out_THD`` become zero."""
        k_cache, v_cache = (cache_BSKD.flatten(0, 1) for cache_BSKD in kv_cache.unbind(0))
        rows = slice(metadata.num_tokens) if metadata.rows is None else metadata.rows
        k_cache.index_copy_(0, metadata.slots, k_TKD[rows])
        v_cache.index_copy_(0, metadata.slots, v_TKD[rows])
        if metadata.decodes is not None:
            self._decode(q_THD, k_cache, v_cache, metadata.decodes, out_THD)
        for prefill in metadata.prefills:
            self._prefill(q_THD, k_cache, v_cache, prefill, out_THD)
        out_THD[metadata.num_tokens :].zero_()

    def _plan_decodes(self, geometry: BatchGeometry, num_reqs: int) -> DecodeBatch:
        seq_lens_cpu = geometry.seq_lens_cpu[:num_reqs]
        shortest, longest = int(seq_lens_cpu.min()), int(seq_lens_cpu.max())
        seq_lens_R1 = geometry.seq_lens[:num_reqs, None].long()
        position_L = torch.arange(longest, device=self.device)
        # Of a row without a context, the first cell; whatever lengths say, an index must not leave the table.
        readable_RL = torch.minimum(position_L, seq_lens_R1 - 1).clamp_(min=0)
        window = self.spec.sliding_window
        mask_R11L = None
        if shortest != longest or (window is not None and longest > window):
            hidden_RL = position_L >= seq_lens_R1
            if window is not None:
                hidden_RL = hidden_RL | (position_L < seq_lens_R1 - window)
            mask_RL = torch.zeros(num_reqs, longest, dtype=self.spec.dtype, device=self.device)
            mask_R11L = mask_RL.masked_fill_(hidden_RL, float("-inf"))[:, None, None, :]
        slots_RL = self._slots(geometry.block_table_RM[:num_reqs], readable_RL)
        return DecodeBatch(num_reqs, slots_RL.flatten(), mask_R11L)

    def _plan_prefill(self, geometry: BatchGeometry, request: int) -> Prefill:
        window = self.spec.sliding_window
        start, stop = (int(row) for row in geometry.query_start_loc_cpu[request : request + 2])
        context_len = int(geometry.seq_lens_cpu[request])
        first_query = context_len - (stop - start)
        first_key = 0 if window is None else max(0, first_query - window + 1)
        key_L = torch.arange(first_key, context_len, device=self.device)
        mask_NL = None
        if first_query > 0 or (window is not None and context_len > window):
            query_N1 = torch.arange(first_query, context_len, device=self.device)[:, None]
            mask_NL = key_L <= query_N1
            if window is not None:
                mask_NL &= key_L > query_N1 - window
        slots_1L = self._slots(geometry.block_table_RM[request : request + 1], key_L[None])
        return Prefill(slice(start, stop), slots_1L[0], mask_NL)

    def _slots(self, block_table_RM: torch.Tensor, position_RL: torch.Tensor) -> torch.Tensor:
        """Cache slot of each position of each request, int64 [R, L]."""
        block_size = self.spec.block_size
        block_RL = block_table_RM.long().gather(1, position_RL // block_size)
        return block_RL * block_size + position_RL % block_size

    def _decode(
        self,
        q_THD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: DecodeBatch,
        out_THD: torch.Tensor,
    ) -> None:
        # The G query heads of a KV head stand in the place of query positions: no key is repeated.
        spec, num_reqs = self.spec, batch.num_reqs
        k_RKLD, v_RKLD = (
            cache.index_select(0, batch.slots).view(num_reqs, -1, spec.num_kv_heads, spec.head_dim).transpose(1, 2)
            for cache in (k_cache, v_cache)
        )
        grouped = (num_reqs, spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_dim)
        out_RKGD = scaled_dot_product_attention(
            q_THD[:num_reqs].reshape(grouped), k_RKLD, v_RKLD, attn_mask=batch.mask_R11L, scale=spec.scale
        )
        out_THD[:num_reqs].view(grouped).copy_(out_RKGD)

    def _prefill(
        self,
        q_THD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        prefill: Prefill,
        out_THD: torch.Tensor,
    ) -> None:
        # KV heads are the batch dimension here, with keys and values broadcast over each one's query heads.
        spec = self.spec
        group_size = spec.num_heads // spec.num_kv_heads
        k_KGLD, v_KGLD = (
            cache.index_select(0, prefill.slots_L).transpose(0, 1)[:, None].expand(-1, group_size, -1, -1)
            for cache in (k_cache, v_cache)
        )
        grouped = (-1, spec.num_kv_heads, group_size, spec.head_dim)
        out_KGND = scaled_dot_product_attention(
            q_THD[prefill.tokens].reshape(grouped).permute(1, 2, 0, 3),
            k_KGLD,
            v_KGLD,
            attn_mask=prefill.mask_NL,
            is_causal=prefill.mask_NL is None,
            scale=spec.scale,
        )
        out_THD[prefill.tokens].view(grouped).copy_(out_KGND.permute(2, 0, 1, 3))
