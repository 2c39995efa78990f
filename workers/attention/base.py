"""The seam between the model and attention: one small interface over a paged KV cache.

Knows the batch's geometry (query starts, lengths, block tables) and nothing about weights, sampling or
requests.

Shape suffixes: T = tokens of the batch (padded), R = requests (padded), H = query heads, K = KV heads,
D = head size, S = block size, B = physical blocks, M = most blocks of one request, P = positions.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from workers.kernels import reference
from workers.modes import AttentionCGSupport

#: ``slot_mapping`` entry of a padding row: writes to no cache slot.
PADDING_SLOT = -1


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is fixed for the lifetime of a model.

    Attributes:
        scale: Multiplies q.k before the softmax.
        sliding_window: Keys further back than this many positions (own position included) are masked, or
            None.
        dtype: Of q, k, v and of the KV cache.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    dtype: torch.dtype
    sliding_window: int | None = None


@dataclasses.dataclass(slots=True)
class BatchGeometry:
    """One step's batch, as the runner lays it out in its persistent buffers.

    The device tensors are views of persistent buffers (same addresses every step), so a captured graph may
    read them; the host arrays are the same numbers for backends that plan on the CPU. Rows at and beyond
    ``num_reqs`` and tokens at and beyond ``num_tokens`` are padding: ``seq_lens`` 0, ``slot_mapping`` -1, and
    ``query_start_loc`` repeating its last value.

    Attributes:
        num_reqs: Real requests.
        num_tokens: Real tokens.
        max_query_len: Longest query of the batch; 1 in a pure decode.
        max_seq_len: Longest context of the batch, queries included.
        query_start_loc_cpu: int32 [R + 1], first token of each request.
        seq_lens_cpu: int32 [R], context length including this step's tokens.
        query_start_loc: int32 [R + 1] on the device.
        seq_lens: int32 [R] on the device.
        block_table_RM: int32 [R, M] on the device.
        slot_mapping_T: int64 [T] on the device; block * block_size + offset, or -1.
    """

    num_reqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc_cpu: npt.NDArray[np.int32]
    seq_lens_cpu: npt.NDArray[np.int32]
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table_RM: torch.Tensor
    slot_mapping_T: torch.Tensor

    def last_rows(self) -> torch.Tensor:
        """int32 [num_reqs] on the device: row of the last token of each request."""
        return self.query_start_loc[1 : self.num_reqs + 1] - 1

    @property
    def is_pure_decode(self) -> bool:
        """Whether every request brings exactly one token."""
        return self.max_query_len == 1


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """What queries and keys still need before they attend: RMS norms over their heads, if any, then rotation.

    Attributes:
        positions_T: int64 position of each token, padding included: a row of the table.
        cos_sin_cache_PD: fp32, ``cat(cos, sin)`` of D/2 frequencies each.
        q_norm_D: Weight of the queries' norm, or None.
        k_norm_D: Weight of the keys' norm, or None; there are both or neither.
        eps: Of the norms.
    """

    positions_T: torch.Tensor
    cos_sin_cache_PD: torch.Tensor
    q_norm_D: torch.Tensor | None = None
    k_norm_D: torch.Tensor | None = None
    eps: float = 0.0


class AttentionBackend(abc.ABC):
    """Paged attention of one model on one device.

    Attributes:
        splitting_ops: Ops that stay outside of compiled pieces. A backend that also names
            ``warmgraph::rope_attention`` rotates by itself, at less cost than a kernel before it.
    """

    name: ClassVar[str]
    cudagraph_support: ClassVar[AttentionCGSupport]
    splitting_ops: ClassVar[tuple[str, ...]] = ("warmgraph::attention",)

    def __init__(self, spec: AttentionSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of one layer's cache: ``[2, B, S, K, D]`` (keys, values) unless a backend says otherwise."""
        s = self.spec
        return (2, num_blocks, s.block_size, s.num_kv_heads, s.head_dim)

    def warmup(self, rope: Rope | None = None) -> dict[str, str]:
        """Compile what a forward needs, ahead of the first one; by default there is nothing to compile.

        Args:
            rope: For forwards with arguments like these.

        Returns:
            Hashes of what was compiled, by name.
        """
        return {}

    @abc.abstractmethod
    def build_metadata(self, geometry: BatchGeometry) -> Any:
        """Turn the step's geometry into what :meth:`forward` wants; called once a step, before the model."""

    def for_last_rows(self, metadata: Any) -> Any:
        """Metadata of the same step for a layer of whose output only each request's last token is read.

        Keys and values are all written. By default the whole output is, too.
        """
        return metadata

    @abc.abstractmethod
    def forward(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        out_THD: torch.Tensor,
    ) -> None:
        """Write k and v to their slots, then write causal attention over the cached context to ``out_THD``.

        Rows of ``out_THD`` that belong to padding are left finite but otherwise undefined.
        """

    def forward_rope(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        out_THD: torch.Tensor,
        rope: Rope,
    ) -> None:
        """:meth:`forward` of queries and keys as the projection left them; here by the reference formulas."""
        if rope.q_norm_D is not None and rope.k_norm_D is not None:
            q_THD = reference.rms_norm(q_THD, rope.q_norm_D, rope.eps)
            k_TKD = reference.rms_norm(k_TKD, rope.k_norm_D, rope.eps)
        q_THD, k_TKD = reference.apply_rope(q_THD, k_TKD, rope.positions_T, rope.cos_sin_cache_PD)
        self.forward(q_THD, k_TKD, v_TKD, kv_cache, metadata, out_THD)
