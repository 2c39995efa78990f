"""Random paged batches for tests of one backend call, each with its dense float64 answer.

Works on any device; knows backends only through ``workers.attention.base``. Shape suffixes as there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tests.paged import dense_attention
from workers.attention.base import PADDING_SLOT, AttentionBackend, AttentionSpec, BatchGeometry, Rope
from workers.kernels import reference

#: Largest relative errors, ``||out - ref|| / ||ref||`` over everything and over one head of one token, that the
#: rounding of softmax weights and of the output explains.
TOLERANCE = {torch.bfloat16: (5e-3, 2e-2), torch.float16: (7e-4, 3e-3)}


@dataclasses.dataclass
class PagedCase:
    """One layer's inputs for one step, and what must come out.

    Attributes:
        out_THD: Poisoned with NaN, so that a row nobody writes shows.
        expected_THD: float64, real tokens only.
        expected_cache: Cache after the step.
    """

    geometry: BatchGeometry
    q_THD: torch.Tensor
    k_TKD: torch.Tensor
    v_TKD: torch.Tensor
    kv_cache: torch.Tensor
    out_THD: torch.Tensor
    expected_THD: torch.Tensor
    expected_cache: torch.Tensor

    def check(self) -> None:
        """Assert that the output, its padding rows and the cache are right."""
        assert self.out_THD.isfinite().all(), "a row of the output was not written, or is not finite"
        self._check(self.out_THD[: self.expected_THD.shape[0]], self.expected_THD)

    def check_last_rows(self) -> None:
        """The same of each request's last token alone."""
        rows_R = self.geometry.last_rows()
        self._check(self.out_THD[rows_R], self.expected_THD[rows_R])

    def _check(self, actual_NHD: torch.Tensor, expected_NHD: torch.Tensor) -> None:
        if actual_NHD.numel():
            overall, of_one_head = TOLERANCE[self.out_THD.dtype]
            error = actual_NHD.double() - expected_NHD
            assert error.norm() <= overall * expected_NHD.norm()
            assert (error.norm(dim=-1) <= of_one_head * expected_NHD.norm(dim=-1)).all()
        # As bit patterns, so that NaN equals itself.
        cells, expected = self.kv_cache.view(torch.int16), self.expected_cache.view(torch.int16)
        assert torch.equal(cells, expected), "a cell was not written, or one that is not this step's was"


def make_geometry(
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    block_size: int,
    device: torch.device,
    rng: np.random.Generator,
    *,
    padded_reqs: int | None = None,
    padded_tokens: int | None = None,
    num_table_columns: int | None = None,
    max_query_len: int | None = None,
) -> tuple[BatchGeometry, int]:
    """A batch whose blocks are scattered at random over a cache; returns it with the number of blocks.

    Unused block-table entries hold a number far outside the cache: reading through one shows.
    """
    num_reqs, num_tokens = len(seq_lens), sum(query_lens)
    rows, tokens = padded_reqs or num_reqs, padded_tokens or num_tokens
    blocks_of = [-(-length // block_size) for length in seq_lens]
    columns = num_table_columns or max([*blocks_of, 1])
    num_blocks = sum(blocks_of) + 3
    order = rng.permutation(num_blocks)
    table = np.full((rows, columns), 2**30, np.int32)
    slots = np.full(tokens, PADDING_SLOT, np.int64)
    starts = np.full(rows + 1, num_tokens, np.int32)
    lengths = np.zeros(rows, np.int32)
    used = token = 0
    for r, (length, query_len) in enumerate(zip(seq_lens, query_lens, strict=True)):
        table[r, : blocks_of[r]] = order[used : used + blocks_of[r]]
        used += blocks_of[r]
        positions = np.arange(length - query_len, length)
        slots[token : token + query_len] = table[r, positions // block_size] * block_size + positions % block_size
        starts[r], lengths[r] = token, length
        token += query_len
    return (
        BatchGeometry(
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            max_query_len=max_query_len or max(query_lens),
            max_seq_len=max(seq_lens, default=0),
            query_start_loc_cpu=starts,
            seq_lens_cpu=lengths,
            query_start_loc=torch.from_numpy(starts).to(device),
            seq_lens=torch.from_numpy(lengths).to(device),
            block_table_RM=torch.from_numpy(table).to(device),
            slot_mapping_T=torch.from_numpy(slots).to(device),
        ),
        num_blocks,
    )


def make_case(
    backend: AttentionBackend,
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    seed: int = 0,
    **geometry_options: Any,
) -> PagedCase:
    """Random tensors over a random geometry, with the dense reference. The cache is NaN where nothing was cached."""
    spec, device = backend.spec, backend.device
    rng = np.random.default_rng(seed)
    geometry, num_blocks = make_geometry(seq_lens, query_lens, spec.block_size, device, rng, **geometry_options)
    num_padded = geometry.slot_mapping_T.shape[0]
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, spec.head_dim, generator=generator, device=device).to(spec.dtype)

    # One wide tensor, as a fused projection leaves it: q, k and v are strided views.
    qkv = draw(num_padded, spec.num_heads + 2 * spec.num_kv_heads)
    q, k, v = split_heads(qkv, spec)
    cells = (2, num_blocks * spec.block_size, spec.num_kv_heads, spec.head_dim)
    before = torch.full(cells, float("nan"), dtype=spec.dtype, device=device)
    after = before.clone()
    expected = [torch.zeros(0, spec.num_heads, spec.head_dim, dtype=torch.float64, device=device)]
    for r, (length, query_len) in enumerate(zip(seq_lens, query_lens, strict=True)):
        start, cached = int(geometry.query_start_loc_cpu[r]), length - query_len
        new = slice(start, start + query_len)
        keys, values = draw(length, spec.num_kv_heads), draw(length, spec.num_kv_heads)
        keys[cached:], values[cached:] = k[new], v[new]
        positions = torch.arange(length, device=device)
        slots = geometry.block_table_RM[r, positions // spec.block_size] * spec.block_size
        slots = slots + positions % spec.block_size
        after[0, slots], after[1, slots] = keys, values
        before[:, slots[:cached]] = after[:, slots[:cached]]
        expected.append(dense_attention(q[new], keys, values, spec.scale, spec.sliding_window))
    return PagedCase(
        geometry=geometry,
        q_THD=q,
        k_TKD=k,
        v_TKD=v,
        kv_cache=_to_backend_layout(before, backend, num_blocks),
        out_THD=torch.full_like(q, float("nan"), memory_format=torch.contiguous_format),
        expected_THD=torch.cat(expected),
        expected_cache=_to_backend_layout(after, backend, num_blocks),
    )


def split_heads(qkv: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Strided views of a fused projection ``[T, H + 2K, D]``."""
    q_end, k_end = spec.num_heads, spec.num_heads + spec.num_kv_heads
    return qkv[:, :q_end], qkv[:, q_end:k_end], qkv[:, k_end:]


def run_case(backend: AttentionBackend, case: PagedCase) -> None:
    """One step of one layer."""
    metadata = backend.build_metadata(case.geometry)
    backend.forward(case.q_THD, case.k_TKD, case.v_TKD, case.kv_cache, metadata, case.out_THD)


def run_last_rows(backend: AttentionBackend, case: PagedCase) -> None:
    """:func:`run_case` of a layer of which each request's last token is enough."""
    metadata = backend.for_last_rows(backend.build_metadata(case.geometry))
    backend.forward(case.q_THD, case.k_TKD, case.v_TKD, case.kv_cache, metadata, case.out_THD)


def check_rope(
    backend: AttentionBackend,
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    has_norms: bool,
    seed: int = 0,
    **geometry_options: Any,
) -> None:
    """A step whose queries and keys come as projected gives what one gives that the reference has rotated before."""
    raw, rotated = (make_case(backend, seq_lens, query_lens, seed, **geometry_options) for _ in range(2))
    rope = make_rope(raw, has_norms=has_norms, seed=seed)
    q_THD, k_TKD = raw.q_THD, raw.k_TKD
    if rope.q_norm_D is not None and rope.k_norm_D is not None:
        q_THD = reference.rms_norm(q_THD, rope.q_norm_D, rope.eps)
        k_TKD = reference.rms_norm(k_TKD, rope.k_norm_D, rope.eps)
    rotated.q_THD, rotated.k_TKD = reference.apply_rope(q_THD, k_TKD, rope.positions_T, rope.cos_sin_cache_PD)
    run_case(backend, rotated)
    metadata = backend.build_metadata(raw.geometry)
    backend.forward_rope(raw.q_THD, raw.k_TKD, raw.v_TKD, raw.kv_cache, metadata, raw.out_THD, rope)
    num_tokens = raw.geometry.num_tokens
    overall, of_one_head = TOLERANCE[raw.out_THD.dtype]
    assert raw.out_THD.isfinite().all()
    for got, expected in (
        (raw.out_THD[:num_tokens].double(), rotated.out_THD[:num_tokens].double()),
        (raw.kv_cache.nan_to_num(nan=7.0).double(), rotated.kv_cache.nan_to_num(nan=7.0).double()),
    ):
        assert (got - expected).norm() <= overall * expected.norm()
        assert ((got - expected).norm(dim=-1) <= of_one_head * expected.norm(dim=-1)).all()


def make_rope(case: PagedCase, *, has_norms: bool, seed: int = 0) -> Rope:
    """Random angles at the tokens' own positions, and random norm weights."""
    head_dim, device = case.q_THD.shape[-1], case.q_THD.device
    generator = torch.Generator(device).manual_seed(seed + 1)
    geometry = case.geometry
    num_positions = int(geometry.seq_lens_cpu.max(initial=1))
    angles_PF = torch.rand(num_positions, head_dim // 2, generator=generator, device=device) * 6.3
    positions_T = torch.zeros(case.q_THD.shape[0], dtype=torch.int64, device=device)
    for r in range(geometry.num_reqs):
        start, end = geometry.query_start_loc_cpu[r : r + 2].tolist()
        length = int(geometry.seq_lens_cpu[r])
        positions_T[start:end] = torch.arange(length - (end - start), length, device=device)
    norms = [torch.randn(head_dim, generator=generator, device=device).to(case.q_THD.dtype) for _ in range(2)]
    table_PD = torch.cat((angles_PF.cos(), angles_PF.sin()), dim=-1)
    return Rope(positions_T, table_PD, *norms, 1e-5) if has_norms else Rope(positions_T, table_PD)


def _to_backend_layout(cells: torch.Tensor, backend: AttentionBackend, num_blocks: int) -> torch.Tensor:
    """``[2, B * S, K, D]`` to the backend's own: keys and values outermost, or inside blocks with heads outermost."""
    spec = backend.spec
    pages = cells.view(2, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
    shape = backend.kv_cache_shape(num_blocks)
    if shape == tuple(pages.shape):
        return pages.contiguous()
    heads_first = pages.permute(1, 0, 3, 2, 4)
    assert shape == tuple(heads_first.shape), "teach this helper the backend's layout"
    return heads_first.contiguous()
