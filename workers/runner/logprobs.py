"""Logprobs of a step, from device tensors to the plain data that outputs carry.

Knows the sampler's tensors and the order of a step's rows.

Shape suffixes: R = sampled rows, N = prompt rows, K = alternatives, E = model width, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from workers.outputs import Logprob, PositionLogprobs
from workers.request import Request
from workers.sampling.logprobs import compute_logprobs
from workers.sampling.sampler import SamplerOutput
from workers.scheduler.output import ScheduledRequest, SchedulerOutput

#: Prompt rows whose logits are held at once: 512 rows of a 128k vocabulary in fp32 are 0.25 GiB.
_ROWS_AT_ONCE = 512


def make_position(
    token_id: int, logprob: float, rank: int, top_ids: Sequence[int], top_logprobs: Sequence[float]
) -> PositionLogprobs:
    """One position: the chosen token first, then the alternatives, most likely first."""
    position = {token_id: Logprob(logprob, rank)}
    for place, (other, value) in enumerate(zip(top_ids, top_logprobs, strict=True), start=1):
        position.setdefault(other, Logprob(value, place))
    return position


@dataclasses.dataclass(slots=True)
class PromptLogprobsChunk:
    """Logprobs of consecutive prompt tokens.

    Attributes:
        first_position: Position of the first token that they are about; at least 1.
        positions: One entry per token.
    """

    first_position: int
    positions: list[PositionLogprobs]


class PendingLogprobs:
    """Logprobs of a step's sampled tokens, still on the device."""

    def __init__(self, requests: list[Request], sampled: SamplerOutput) -> None:
        self._requests = requests
        self._sampled = sampled

    def to_host(self) -> dict[str, list[PositionLogprobs]]:
        """One position per request that asked, by request id; waits for the device."""
        logprobs = self._sampled.logprobs
        assert logprobs is not None, "the plan asked for logprobs"
        token_ids, chosen, ranks, top, top_ids = (
            tensor.tolist()
            for tensor in (
                self._sampled.token_ids_R,
                logprobs.chosen_N,
                logprobs.rank_N,
                logprobs.top_NK,
                logprobs.top_ids_NK,
            )
        )
        positions = {}
        for row, request in enumerate(self._requests):
            wanted = request.params.logprobs
            if wanted is not None:
                positions[request.request_id] = [
                    make_position(token_ids[row], chosen[row], ranks[row], top_ids[row][:wanted], top[row][:wanted])
                ]
        return positions


def prompt_logprobs(
    output: SchedulerOutput, hidden_TE: torch.Tensor, compute_logits: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, PromptLogprobsChunk]:
    """Logprobs of the prompt tokens that a step's prefill chunks predict, for requests that asked, by request id.

    The row at position p predicts the token at p + 1; the prompt's last row predicts output and is left to the
    sampler. Waits for the device: prompt logprobs are for evaluation, not for serving at speed.
    """
    chunks = {}
    first_row = 0
    for item in output.scheduled:
        if item.request.params.prompt_logprobs is not None:
            num_rows = min(item.num_computed_tokens + item.num_tokens, item.request.num_prompt_tokens - 1)
            num_rows -= item.num_computed_tokens
            if num_rows > 0:
                rows_NE = hidden_TE[first_row : first_row + num_rows]
                positions = _prompt_positions(item, rows_NE, compute_logits)
                chunks[item.request.request_id] = PromptLogprobsChunk(item.num_computed_tokens + 1, positions)
        first_row += item.num_tokens
    return chunks


def _prompt_positions(
    item: ScheduledRequest, rows_NE: torch.Tensor, compute_logits: Callable[[torch.Tensor], torch.Tensor]
) -> list[PositionLogprobs]:
    num_top = item.request.params.prompt_logprobs
    assert num_top is not None
    start = item.num_computed_tokens + 1
    token_ids = item.request.token_ids[start : start + len(rows_NE)]
    positions = []
    for begin in range(0, len(token_ids), _ROWS_AT_ONCE):
        ids = token_ids[begin : begin + _ROWS_AT_ONCE]
        logits_NV = compute_logits(rows_NE[begin : begin + len(ids)])
        result = compute_logprobs(logits_NV, torch.tensor(ids, device=logits_NV.device), num_top)
        columns = (tensor.tolist() for tensor in (result.chosen_N, result.rank_N, result.top_ids_NK, result.top_NK))
        for token_id, chosen, rank, top_ids, top in zip(ids, *columns, strict=True):
            positions.append(make_position(token_id, chosen, rank, top_ids, top))
    return positions
