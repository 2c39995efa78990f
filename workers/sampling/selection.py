"""The most likely tokens of every row: argmax and top-k, quick on a CPU too.

``torch.argmax`` and ``torch.topk`` walk a row element by element on a CPU (1 ms for 8 rows of 49152), while
``amax`` is vectorised (0.06 ms). So on a CPU a row is cut into blocks, the maxima of the blocks say which blocks
can hold the answer, and only those are walked. On a GPU, argmax is a kernel of our own where there is Triton; otherwise
torch's are used.

Shape suffixes: R rows, V vocabulary, N whole blocks in a row, B tokens of a block, K tokens asked for,
C candidates.
"""

from __future__ import annotations

import torch

from workers.kernels.triton_found import has_triton

#: Tokens per block.
BLOCK_SIZE = 128


def split_blocks(x_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the whole blocks, [R, N, B], and of what is left at the end, [R, V - N * B]."""
    num_blocks = x_RV.shape[1] // BLOCK_SIZE
    end = num_blocks * BLOCK_SIZE
    return x_RV[:, :end].view(len(x_RV), num_blocks, BLOCK_SIZE), x_RV[:, end:]


def first_argmax(x_RV: torch.Tensor) -> torch.Tensor:
    """int64 [R]: index of the largest value; the first of equal ones."""
    if x_RV.is_cuda and has_triton():
        from workers.sampling.argmax_triton import argmax

        return argmax(x_RV)
    if not _by_blocks(x_RV, 1):
        return x_RV.argmax(dim=-1)
    blocks_RNB, tail_RT = split_blocks(x_RV)
    maxima_RN = blocks_RNB.amax(dim=-1)
    if tail_RT.shape[1]:
        maxima_RN = torch.cat((maxima_RN, tail_RT.amax(dim=-1, keepdim=True)), dim=1)
    # Past the end of a tail the last token is looked at again: an equal value that does not come first.
    first_R1 = maxima_RN.argmax(dim=-1, keepdim=True) * BLOCK_SIZE
    ids_RB = (first_R1 + torch.arange(BLOCK_SIZE, device=x_RV.device)).clamp(max=x_RV.shape[1] - 1)
    return ids_RB.gather(1, x_RV.gather(1, ids_RB).argmax(dim=-1, keepdim=True)).squeeze(1)


def top_k(x_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest values of every row, largest first, and their indices, both [R, K].

    The order of equal values, and which of several values equal to the last one are returned, is left open.
    """
    if not _by_blocks(x_RV, k):
        values_RK, ids_RK = x_RV.topk(k, dim=-1)
        return values_RK, ids_RK
    blocks_RNB, tail_RT = split_blocks(x_RV)
    # The k largest values lie in the k blocks with the largest maxima, up to ties.
    block_RK = blocks_RNB.amax(dim=-1).topk(k, dim=-1, sorted=False).indices
    candidates_RC = torch.cat((_take_blocks(blocks_RNB, block_RK), tail_RT), dim=1)
    values_RK, positions_RK = candidates_RC.topk(k, dim=-1)
    return values_RK, _candidate_ids(block_RK, x_RV.shape[1]).gather(1, positions_RK)


def _by_blocks(x_RV: torch.Tensor, k: int) -> bool:
    """Whether looking at ``k`` blocks is less work than walking the rows."""
    return x_RV.device.type == "cpu" and 0 < 4 * k <= x_RV.shape[1] // BLOCK_SIZE


def _take_blocks(blocks_RNB: torch.Tensor, block_RK: torch.Tensor) -> torch.Tensor:
    """The chosen blocks side by side, [R, K * B]."""
    index_RKB = block_RK[:, :, None].expand(-1, -1, BLOCK_SIZE)
    return blocks_RNB.gather(1, index_RKB).flatten(1)


def _candidate_ids(block_RK: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Token ids of ``_take_blocks`` followed by the tail, [R, C]."""
    offset_B = torch.arange(BLOCK_SIZE, device=block_RK.device)
    ids_RC = (block_RK[:, :, None] * BLOCK_SIZE + offset_B).flatten(1)
    tail_T = torch.arange(vocab_size // BLOCK_SIZE * BLOCK_SIZE, vocab_size, device=block_RK.device)
    return torch.cat((ids_RC, tail_T.expand(len(ids_RC), -1)), dim=1)
