"""Logprobs of a step, from device tensors to the plain data that outputs carry.

Knows the sampler's tensors and the order of a step's rows.

Shape suffixes: T = tokens of the step, R = sampled rows, N = prompt rows, E = model width, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from workers.outputs import PositionLogprobs
from workers.request import Request
from workers.sampling.logprobs import LogprobsTensors, compute_logprobs
from workers.scheduler.output import ScheduledRequest, SchedulerOutput

#: Prompt rows whose logits are held at once: 512 rows of a 128k vocabulary in fp32 are 0.25 GiB.
_ROWS_AT_ONCE = 512


@dataclasses.dataclass(slots=True)
class PromptLogprobsChunk:
    """Logprobs of consecutive prompt tokens.

    Attributes:
        first_position: Position of the first token that they are about; at least 1.
        positions: One entry per token.
    """

    first_position: int
    positions: list[PositionLogprobs]


def sampled_logprobs(
    requests: list[Request], token_ids: list[int], logprobs: LogprobsTensors
) -> dict[int, list[PositionLogprobs]]:
    """One position per sampled request that asked for logprobs, by row; waits for the device.

    Args:
        requests: The sampled requests, in row order.
        token_ids: Their tokens.
        logprobs: The sampler's result for the same rows.
    """
    rows = logprobs.to_lists()
    return {
        row: [rows.position(row, token_ids[row], request.params.logprobs)]
        for row, request in enumerate(requests)
        if request.params.logprobs is not None
    }


def wants_prompt_logprobs(output: SchedulerOutput) -> bool:
    """Whether a step is to give logprobs of prompt tokens, and so needs more rows than each request's last."""
    return any(_num_prompt_rows(item) > 0 for item in output.scheduled)


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
        num_rows = _num_prompt_rows(item)
        if num_rows > 0:
            rows_NE = hidden_TE[first_row : first_row + num_rows]
            positions = _prompt_positions(item, rows_NE, compute_logits)
            chunks[item.request.request_id] = PromptLogprobsChunk(item.num_computed_tokens + 1, positions)
        first_row += item.num_tokens
    return chunks


def _num_prompt_rows(item: ScheduledRequest) -> int:
    """Rows of a step that predict prompt tokens whose logprobs were asked for; the prompt's last row does not."""
    if item.request.params.prompt_logprobs is None:
        return 0
    end = min(item.num_computed_tokens + item.num_tokens, item.request.num_prompt_tokens - 1)
    return max(end - item.num_computed_tokens, 0)


def _prompt_positions(
    item: ScheduledRequest, rows_NE: torch.Tensor, compute_logits: Callable[[torch.Tensor], torch.Tensor]
) -> list[PositionLogprobs]:
    num_top = item.request.params.prompt_logprobs
    assert num_top is not None
    start = item.num_computed_tokens + 1
    token_ids = item.request.token_ids[start : start + len(rows_NE)].tolist()
    positions: list[PositionLogprobs] = []
    for begin in range(0, len(token_ids), _ROWS_AT_ONCE):
        ids = token_ids[begin : begin + _ROWS_AT_ONCE]
        logits_NV = compute_logits(rows_NE[begin : begin + len(ids)])
        rows = compute_logprobs(logits_NV, torch.tensor(ids, device=logits_NV.device), num_top).to_lists()
        positions.extend(rows.position(row, token_id, num_top) for row, token_id in enumerate(ids))
    return positions
