"""The batches that a verification runs: full, padded, and padded with poison; and how two results are compared.

Poison is whatever padding may hold without being read: other tokens, the last position, block tables that point at a
block of NaN, and NaN in every KV block that the batch does not own.

Shape suffixes: T = tokens, R = requests, M = most blocks of a request.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch

from workers.analysis.harness import Batch, Chunk, ModelHarness
from workers.graphs import BatchDescriptor

#: Largest relative difference of a row that rounding explains, by the size of a number in bytes.
_TOLERANCE = {4: 1e-3, 2: 0.1}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One batch.

    Attributes:
        name: ``full``, ``padded`` or ``poisoned``.
        seed: Of its tokens and blocks.
    """

    name: str
    chunks: tuple[Chunk, ...]
    seed: int

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(chunk.num_tokens for chunk in self.chunks)


def make_cases(size: int, max_num_seqs: int, max_context: int, *, is_decode: bool, seed: int) -> list[Case]:
    """Cases for a graph of ``size`` tokens: one that fills it, and two that leave some of it to padding."""
    generator = random.Random(f"{seed}/{size}/{is_decode}")
    make = _decode_chunks if is_decode else _mixed_chunks
    cases = [Case("full", make(size, max_num_seqs, max_context, generator), generator.randrange(1 << 30))]
    if size > 1:
        chunks = make(generator.randint(max(1, size // 2), size - 1), max_num_seqs, max_context, generator)
        case_seed = generator.randrange(1 << 30)
        cases += [Case("padded", chunks, case_seed), Case("poisoned", chunks, case_seed)]
    return cases


def _decode_chunks(num_tokens: int, max_num_seqs: int, max_context: int, generator: random.Random) -> tuple[Chunk, ...]:
    assert num_tokens <= max_num_seqs
    return tuple(Chunk(1, generator.randrange(max_context)) for _ in range(num_tokens))


def _mixed_chunks(num_tokens: int, max_num_seqs: int, max_context: int, generator: random.Random) -> tuple[Chunk, ...]:
    """Some decodes, then prompts, some of them continued."""
    num_decodes = generator.randint(0, min(num_tokens // 2, max_num_seqs - 1))
    # Every prompt must find a seat, and none may be longer than the context.
    while num_decodes and -(-(num_tokens - num_decodes) // max_context) > max_num_seqs - num_decodes:
        num_decodes -= 1
    left = num_tokens - num_decodes
    num_prompts = min(max(-(-left // max_context), generator.randint(1, 4)), left, max_num_seqs - num_decodes)
    chunks = list(_decode_chunks(num_decodes, max_num_seqs, max_context, generator))
    for index in range(num_prompts):
        length = left // num_prompts + (index < left % num_prompts)
        chunks.append(Chunk(length, generator.randrange(max_context - length + 1)))
    return tuple(chunks)


class KvState:
    """Random contents for the KV caches, and poison for what a batch does not own."""

    def __init__(self, harness: ModelHarness, seed: int) -> None:
        self._harness = harness
        one, two = (harness.attention.kv_cache_shape(count) for count in (1, 2))
        self._axis = next(axis for axis, sizes in enumerate(zip(one, two, strict=True)) if sizes[0] != sizes[1])
        generator = torch.Generator(harness.device).manual_seed(seed)
        self._contents = [
            torch.randn(cache.shape, generator=generator, device=cache.device).to(cache.dtype)
            for cache in harness.kv_caches
        ]

    def reset(self, batch: Batch, *, is_poisoned: bool) -> None:
        """Fill the caches again; with poison, everything outside of the batch's blocks is NaN."""
        unused = self._unused(batch) if is_poisoned else None
        with torch.inference_mode():
            for cache, contents in zip(self._harness.kv_caches, self._contents, strict=True):
                cache.copy_(contents)
                if unused is not None:
                    cache.index_fill_(self._axis, unused, float("nan"))

    def used(self, batch: Batch) -> list[torch.Tensor]:
        """Copies of the batch's blocks, per layer."""
        index = torch.tensor(batch.used_blocks, device=self._harness.device)
        return [cache.index_select(self._axis, index) for cache in self._harness.kv_caches]

    def has_strayed(self, batch: Batch, *, is_poisoned: bool) -> bool:
        """Whether a block that is not the batch's has changed since :meth:`reset`."""
        index = self._unused(batch)
        for cache, contents in zip(self._harness.kv_caches, self._contents, strict=True):
            now = cache.index_select(self._axis, index)
            untouched = now.isnan().all() if is_poisoned else torch.equal(now, contents.index_select(self._axis, index))
            if not untouched:
                return True
        return False

    def _unused(self, batch: Batch) -> torch.Tensor:
        mask = torch.ones(self._harness.num_blocks, dtype=torch.bool)
        mask[batch.used_blocks] = False
        return mask.nonzero().flatten().to(self._harness.device)


def lay_out(harness: ModelHarness, case: Case, descriptor: BatchDescriptor) -> Batch:
    """The case in the harness' buffers, padded to ``descriptor``, with poison where it says so."""
    batch = harness.batch(case.chunks, descriptor, case.seed)
    if case.name == "poisoned":
        _poison(harness, batch)
    return batch


def _poison(harness: ModelHarness, batch: Batch) -> None:
    geometry = batch.geometry
    used = set(batch.used_blocks)
    stranger = next(block for block in range(harness.num_blocks) if block not in used)
    with torch.inference_mode():
        batch.input_ids_T[batch.num_tokens :] = harness.model.config.vocab_size - 1
        batch.positions_T[batch.num_tokens :] = harness.max_context - 1
        columns = torch.arange(geometry.block_table_RM.shape[1], device=harness.device)
        num_blocks = -(-geometry.seq_lens // harness.config.block_size)
        geometry.block_table_RM.masked_fill_(columns >= num_blocks[:, None], stranger)


def tolerance_of(dtype: torch.dtype) -> float:
    """Largest relative difference that rounding explains."""
    return _TOLERANCE[dtype.itemsize]


def row_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest over the rows: root mean square of the difference over that of the row; infinite where not finite."""
    if expected.numel() == 0:
        return 0.0
    got, expected = got.flatten(1).double(), expected.flatten(1).double()
    scale = expected.square().mean(1).sqrt().clamp(min=1e-6)
    error = ((got - expected).square().mean(1).sqrt() / scale).nan_to_num(float("inf"))
    return float(error.max())


def worst_error(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """:func:`row_error` of whole tensors, each as one row."""
    pairs = zip(got, expected, strict=True)
    return max((row_error(now.reshape(1, -1), then.reshape(1, -1)) for now, then in pairs), default=0.0)
