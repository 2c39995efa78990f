"""The kernels of one attention spec, specialised once and launched by name.

Turns tensors into grids and argument lists; decides nothing. Needs triton.

Shape suffixes: as in :mod:`workers.attention.base`.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from workers.attention.base import AttentionSpec, Rope
from workers.attention.triton_kernels.cache_write import cache_write_kernel
from workers.attention.triton_kernels.decode import decode_kernel
from workers.attention.triton_kernels.prefill import prefill_kernel
from workers.attention.triton_kernels.rope import NO_ROPE, NORM_AND_ROTATE, ROTATE
from workers.attention.triton_kernels.tuning import DecodeTile, PrefillTile, SplitPlan, SplitPolicy
from workers.kernels.triton_launch import KernelLaunch, can_overlap_launches, is_interpreted

#: Tokens of one cache-write program.
WRITE_TOKENS = 32
#: Requests that a program looks at in one go: a prefill program for its own, a decode program for long contexts.
ROW_TILE = 256
#: Elements of partial results that a merge holds in registers at a time (16 for each of 128 threads).
MERGE_ELEMENTS = 2048

# Example arguments for specialisation: a multiple of 16 (strides), and any number (sizes; see the kernels'
# do_not_specialize lists).
_ALIGNED = 16
_ANY = 2
_I32, _I64, _F32 = torch.int32, torch.int64, torch.float32


@dataclasses.dataclass(frozen=True, slots=True)
class RopeKind:
    """What kernels do to queries and keys as they load them.

    Attributes:
        code: ``NO_ROPE``, ``ROTATE`` or ``NORM_AND_ROTATE``.
        eps: Of the norms.
    """

    code: int = NO_ROPE
    eps: float = 0.0

    @classmethod
    def of(cls, rope: Rope | None) -> RopeKind:
        """The kind that a call with these arguments takes."""
        if rope is None:
            return cls()
        return cls(ROTATE) if rope.q_norm_D is None else cls(NORM_AND_ROTATE, rope.eps)


@dataclasses.dataclass(frozen=True, slots=True)
class _Launches:
    """The kernels of one kind; decodes of a mixed batch and of a pure one."""

    write: KernelLaunch
    decode_uniform: KernelLaunch
    decode_mixed: KernelLaunch
    prefill: KernelLaunch


class KernelSet:
    """Cache write, decode and prefill for one spec on one device, for each kind of rotation that is asked for.

    Owns the workspace for partial results; its size follows from the policy, not from any batch. The first
    ``max_programs`` slots are ``(row * K + head) * num_splits + split``, the others ``overflow_chunks`` per KV head.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        device: torch.device,
        decode_tile: DecodeTile,
        prefill_tile: PrefillTile,
        splits: SplitPolicy,
    ) -> None:
        self.spec = spec
        self.splits = splits
        self._device = device
        self.group = spec.num_heads // spec.num_kv_heads
        self.block_q = prefill_tile.block_m // self.group
        self._head_dim_padded = _next_power_of_2(spec.head_dim)
        self._group_merge = _next_power_of_2(self.group)
        self._merge_tile = max(MERGE_ELEMENTS // (self._group_merge * self._head_dim_padded), 2)
        self._qk_scale = spec.scale * math.log2(math.e)
        self._window = spec.sliding_window or 0

        slots = (splits.max_programs + splits.overflow_chunks * spec.num_kv_heads) * self.group
        self._partials = (
            torch.empty(slots * spec.head_dim, dtype=_F32, device=device),
            torch.empty(slots, dtype=_F32, device=device),
            torch.empty(slots, dtype=_F32, device=device),
        )
        # One per (row, KV head). A launch leaves them at zero, as it found them.
        self._counters = torch.zeros(splits.max_programs, dtype=_I32, device=device)

        self._decode_tile, self._prefill_tile = decode_tile, prefill_tile
        self._by_kind: dict[RopeKind, _Launches] = {}

    def launches(self, kind: RopeKind) -> dict[str, KernelLaunch]:
        """Every kernel of this kind, by name."""
        launches = self._of_kind(kind)
        return {
            "cache_write": launches.write,
            "decode_uniform": launches.decode_uniform,
            "decode_mixed": launches.decode_mixed,
            "prefill": launches.prefill,
        }

    def _of_kind(self, kind: RopeKind) -> _Launches:
        launches = self._by_kind.get(kind)
        if launches is None:
            launches = self._by_kind[kind] = _Launches(
                self._specialize_write(kind),
                self._specialize_decode(kind, mixed=False),
                self._specialize_decode(kind, mixed=True),
                self._specialize_prefill(kind),
            )
        return launches

    def write_cache(
        self,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping_T: torch.Tensor,
        out_THD: torch.Tensor,
        rope: Rope | None = None,
    ) -> None:
        """Scatter k and v to their slots; zero the output rows of padding tokens."""
        num_tokens = k_TKD.shape[0]
        self._of_kind(RopeKind.of(rope)).write(
            (self.spec.num_kv_heads, -(-num_tokens // WRITE_TOKENS), 1),
            k_TKD,
            v_TKD,
            out_THD,
            kv_cache,
            slot_mapping_T,
            k_TKD.stride(0),
            v_TKD.stride(0),
            out_THD.stride(0),
            num_tokens,
            *_rope_tensors(rope)[:2],
            rope.k_norm_D if rope else None,
        )

    def decode(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table_RM: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        slot_mapping_T: torch.Tensor,
        out_THD: torch.Tensor,
        plan: SplitPlan,
        *,
        mixed: bool,
        rope: Rope | None = None,
    ) -> None:
        """Write and attend for every request that brings one token.

        Args:
            plan: For as many rows as this launches: R if ``mixed``, else T.
            mixed: Rows are requests, some of which bring other numbers of tokens and are passed over; else row r
                is token r.
        """
        num_rows = seq_lens.shape[0]
        grid_rows = num_rows if mixed else q_THD.shape[0]
        launches = self._of_kind(RopeKind.of(rope))
        (launches.decode_mixed if mixed else launches.decode_uniform)(
            (self.spec.num_kv_heads, grid_rows + plan.overflow_rows, plan.num_splits),
            out_THD,
            q_THD,
            k_TKD,
            v_TKD,
            kv_cache,
            block_table_RM,
            seq_lens,
            query_start_loc,
            slot_mapping_T,
            *self._partials,
            self._counters,
            out_THD.stride(0),
            q_THD.stride(0),
            k_TKD.stride(0),
            v_TKD.stride(0),
            block_table_RM.stride(0),
            num_rows,
            grid_rows,
            plan.num_splits,
            plan.min_chunk,
            plan.max_chunk,
            *_rope_tensors(rope),
        )

    def prefill(
        self,
        q_THD: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table_RM: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        out_THD: torch.Tensor,
        rope: Rope | None = None,
        *,
        last_rows_only: bool = False,
    ) -> None:
        """Attend for every request that brings more than one token; their keys and values are in the cache.

        Args:
            last_rows_only: Leave out tiles of queries that do not hold a request's last one.
        """
        num_reqs = seq_lens.shape[0]
        num_tiles = q_THD.shape[0] // self.block_q + num_reqs
        self._of_kind(RopeKind.of(rope)).prefill(
            (self.spec.num_kv_heads, num_tiles, 1),
            out_THD,
            q_THD,
            kv_cache,
            block_table_RM,
            seq_lens,
            query_start_loc,
            out_THD.stride(0),
            q_THD.stride(0),
            block_table_RM.stride(0),
            num_reqs,
            int(last_rows_only),
            *_rope_tensors(rope)[:3],
        )

    def _specialize_write(self, kind: RopeKind) -> KernelLaunch:
        s, data = self.spec, self.spec.dtype
        return KernelLaunch(
            cache_write_kernel,
            (data, data, data, data, _I64, _ALIGNED, _ALIGNED, _ALIGNED, _ANY, *_rope_examples(kind, data)[:3]),
            (
                *(s.num_kv_heads, self.group, s.head_dim, self._head_dim_padded, s.block_size, WRITE_TOKENS),
                *(kind.code, kind.eps),
            ),
        )

    def _specialize_decode(self, kind: RopeKind, *, mixed: bool) -> KernelLaunch:
        s, data, tile = self.spec, self.spec.dtype, self._decode_tile
        tensors = (data, data, data, data, data, _I32, _I32, _I32, _I64, _F32, _F32, _F32, _I32)
        strides = (_ALIGNED, _ALIGNED, _ALIGNED, _ALIGNED, _ANY)
        # A matrix instruction takes 16 rows, so smaller groups are padded to that.
        groups = (s.num_kv_heads, self.group, max(self._group_merge, 16), self._group_merge)
        cache = (s.head_dim, self._head_dim_padded, s.block_size, self._window)
        tiles = (tile.block_n, self._merge_tile, ROW_TILE)
        slots = (self.splits.max_programs, self.splits.overflow_chunks)
        overlap = tile.overlap_launch and not is_interpreted(decode_kernel) and can_overlap_launches(self._device)
        return KernelLaunch(
            decode_kernel,
            (*tensors, *strides, _ANY, _ANY, _ANY, _ANY, _ANY, *_rope_examples(kind, data)),
            (self._qk_scale, *groups, *cache, *tiles, *slots, mixed, overlap, kind.code, kind.eps),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            max_registers=tile.max_registers,
            launch_pdl=overlap,
        )

    def _specialize_prefill(self, kind: RopeKind) -> KernelLaunch:
        s, data, tile = self.spec, self.spec.dtype, self._prefill_tile
        tensors = (data, data, data, _I32, _I32, _I32)
        arguments = (*tensors, _ALIGNED, _ALIGNED, _ANY, _ANY, _ANY, *_rope_examples(kind, data)[:3])
        heads = (self._qk_scale, s.num_kv_heads, self.group, s.head_dim)
        if tile.hopper:
            # Imported here because Gluon, on a machine that cannot use it, need not even be there.
            from workers.attention.triton_kernels.prefill_hopper import hopper_prefill_kernel

            assert self._window == 0
            tiles = (tile.block_m, tile.block_n, tile.num_stages, ROW_TILE)
            constants = (*heads, s.block_size, *tiles, kind.code, kind.eps)
            return KernelLaunch(hopper_prefill_kernel, arguments, constants, num_warps=tile.num_warps)
        tile_sizes = (tile.block_m, tile.block_n, ROW_TILE)
        return KernelLaunch(
            prefill_kernel,
            arguments,
            (*heads, self._head_dim_padded, s.block_size, self._window, *tile_sizes, kind.code, kind.eps),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _rope_tensors(rope: Rope | None) -> tuple[torch.Tensor | None, ...]:
    """Positions, table, weights of the queries' and of the keys' norm; kernels that do not use one get None."""
    if rope is None:
        return (None, None, None, None)
    return (rope.positions_T, rope.cos_sin_cache_PD, rope.q_norm_D, rope.k_norm_D)


def _rope_examples(kind: RopeKind, data: torch.dtype) -> tuple[torch.dtype | None, ...]:
    """Types of :func:`_rope_tensors`."""
    norm = data if kind.code == NORM_AND_ROTATE else None
    return (None, None, None, None) if kind.code == NO_ROPE else (_I64, _F32, norm, norm)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
