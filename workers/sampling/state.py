"""The sampler's persistent buffers: every request's parameters, in rows indexed by slot.

The runner gives a request a slot for as long as it is in the batch. A step passes the slots of its rows, and the
sampler gathers their parameters on the device, so that the addresses a captured graph reads never move and a step
in which nobody came or went copies nothing. Everything that changed between two steps travels in one copy.

Knows nothing about batches or logits beyond the vocabulary's size.

Shape suffixes: S slots (``max_num_seqs`` and one for padding rows), R rows of a step, F fields, V vocabulary,
K stop ids per slot, B biases per slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from workers.sampling.plan import CANDIDATE_BUCKETS, GREEDY_PLAN, LOGPROB_BUCKETS, SamplingPlan, bucket
from workers.sampling.rows import ROW, Field, SamplingRows
from workers.sampling_params import MAX_LOGIT_BIAS, MAX_STOPS, SamplingParams

#: Most stop ids that min_tokens masks: a request's own and the model's end-of-sequence ids.
MAX_STOP_IDS = 2 * MAX_STOPS
#: Set in a token count when the token is in the prompt; the bits below count its occurrences in the output.
PROMPT_BIT = 1 << 30


class _HostFlags(NamedTuple):
    """What one request adds to a plan."""

    plan: SamplingPlan
    num_candidates: int


class _Upload(NamedTuple):
    """Rows of the large tables that one request needs; empty arrays where it needs none."""

    stop_ids: np.ndarray
    bias_ids: np.ndarray
    bias_values: np.ndarray
    prompt_ids: np.ndarray | None
    output_ids: np.ndarray | None


class SamplingState:
    """Owner of the sampler's device buffers; only the runner's thread may call it.

    ``add`` and ``remove`` are host work. ``flush`` brings the device up to date and must run between them and the
    step that uses the slots.

    Attributes:
        max_num_seqs: Slots for requests: 0 to ``max_num_seqs - 1``.
        vocab_size: Columns of the logits.
        device: Where the buffers live.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device | str) -> None:
        self.max_num_seqs = max_num_seqs
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        num_slots = max_num_seqs + 1
        self._host_SF = np.zeros((num_slots, len(Field)), dtype=np.int32)
        for slot in range(num_slots):
            self._write_row(slot, SamplingParams(temperature=0.0), min_tokens=0, seed=0)
        self._table_SF = torch.zeros(num_slots, len(Field), dtype=torch.int32, device=self.device)
        self._stop_ids_SK = torch.zeros(num_slots, MAX_STOP_IDS, dtype=torch.int64, device=self.device)
        self._bias_ids_SB = torch.zeros(num_slots, MAX_LOGIT_BIAS, dtype=torch.int64, device=self.device)
        self._bias_values_SB = torch.zeros(num_slots, MAX_LOGIT_BIAS, device=self.device)
        self._counts_SV: torch.Tensor | None = None
        self._taken: set[int] = set()
        self._special: dict[int, _HostFlags] = {}
        #: The last slots that were planned for, and their plan; None once a slot has changed hands.
        self._last_plan: tuple[list[int], SamplingPlan] | None = None
        self._uploads: dict[int, _Upload] = {}
        self._table_changed = True
        self.flush()

    @property
    def padding_slot(self) -> int:
        """The slot of padding rows: greedy, and shared by all of them."""
        return self.max_num_seqs

    def add(
        self,
        slot: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        eos_token_ids: Iterable[int],
        seed: int,
    ) -> None:
        """Give ``slot`` to a request. Takes effect on the device at the next ``flush``.

        Args:
            slot: A free slot below ``max_num_seqs``.
            params: With ``n == 1``, and token ids checked by ``params.check_vocabulary``.
            prompt_token_ids: The prompt; read only if the request has penalties.
            output_token_ids: Tokens generated before (after a preemption, or a resumed stream).
            eos_token_ids: Ids that ``min_tokens`` masks besides the request's own stop ids.
            seed: 64-bit key of the request's random numbers: ``params.seed``, or one made up for it.
        """
        assert 0 <= slot < self.max_num_seqs, f"slot {slot} is not one of {self.max_num_seqs}"
        assert slot not in self._taken, f"slot {slot} is taken"
        stop_ids = sorted(params.stop_ids.union(eos_token_ids))
        assert len(stop_ids) <= MAX_STOP_IDS, f"{len(stop_ids)} stop ids; at most {MAX_STOP_IDS} can be masked"
        min_tokens = params.min_tokens if stop_ids else 0
        self._write_row(slot, params, min_tokens, seed)
        self._taken.add(slot)
        self._last_plan = None
        flags = self._host_flags(params, min_tokens)
        if flags.plan != GREEDY_PLAN:
            self._special[slot] = flags
        bias = params.logit_bias or {}
        penalties = params.needs_penalties
        if flags.plan.changes_logits:
            self._uploads[slot] = _Upload(
                stop_ids=np.array(stop_ids if min_tokens else (), dtype=np.int32),
                bias_ids=np.fromiter(bias.keys(), dtype=np.int32, count=len(bias)),
                bias_values=np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
                prompt_ids=np.array(prompt_token_ids, dtype=np.int32) if penalties else None,
                output_ids=np.array(output_token_ids, dtype=np.int32) if penalties else None,
            )
        self._table_changed = True

    def remove(self, slot: int) -> None:
        """Free ``slot``. Its row on the device stays as it is until the next ``add``: nobody reads it."""
        self._taken.remove(slot)
        self._last_plan = None
        self._special.pop(slot, None)
        self._uploads.pop(slot, None)

    def plan(self, slots: Sequence[int]) -> SamplingPlan:
        """The plan of a step whose rows have these slots (padding rows add nothing)."""
        slots = list(slots)
        if self._last_plan is None or self._last_plan[0] != slots:
            self._last_plan = slots, self._union(slots)
        return self._last_plan[1]

    def reserve_counts(self) -> None:
        """Allocate the token counts now (int32 [S, V]), as before capturing a graph with penalties."""
        if self._counts_SV is None:
            shape = (self.max_num_seqs + 1, self.vocab_size)
            self._counts_SV = torch.zeros(shape, dtype=torch.int32, device=self.device)

    def flush(self) -> None:
        """Bring the device up to date: one copy if anything changed since the last call, else nothing."""
        if not self._table_changed:
            return
        segments = [self._host_SF.reshape(-1)]
        for upload in self._uploads.values():
            segments += [upload.stop_ids, upload.bias_ids, upload.bias_values.view(np.int32)]
            segments += [ids for ids in (upload.prompt_ids, upload.output_ids) if ids is not None]
        staged = torch.from_numpy(np.concatenate(segments))
        if self.device.type == "cuda":
            # The pinned copy is this call's own: the allocator keeps it until the transfer has been read.
            staged = staged.pin_memory().to(self.device, non_blocking=True)
        pieces = iter(torch.split(staged, [len(segment) for segment in segments]))
        self._table_SF.copy_(next(pieces).view_as(self._table_SF))
        for slot, upload in self._uploads.items():
            self._write_stop_ids(slot, next(pieces))
            self._write_bias(slot, next(pieces), next(pieces).view(torch.float32))
            if upload.prompt_ids is not None:
                self._write_counts(slot, next(pieces), next(pieces))
        self._uploads.clear()
        self._table_changed = False

    def gather(self, slots_R: torch.Tensor) -> SamplingRows:
        """Parameters of a step's rows. ``slots_R``: int64 [R] on the device."""
        words_RF = self._table_SF.index_select(0, slots_R)
        return SamplingRows(words_RF, words_RF.view(torch.float32))

    def stop_ids_RK(self, slots_R: torch.Tensor) -> torch.Tensor:
        """int64 [R, K]: ids to mask; the last one repeated where a request has fewer."""
        return self._stop_ids_SK.index_select(0, slots_R)

    def logit_bias_RB(self, slots_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (int64) and biases (float32), both [R, B]; a request's own are the first ``num_logit_bias``."""
        return self._bias_ids_SB.index_select(0, slots_R), self._bias_values_SB.index_select(0, slots_R)

    @property
    def counts_SV(self) -> torch.Tensor:
        """int32 [S, V]: occurrences in the output, plus ``PROMPT_BIT`` for tokens of the prompt."""
        assert self._counts_SV is not None, "token counts are allocated by the first request with penalties"
        return self._counts_SV

    def _write_row(self, slot: int, params: SamplingParams, min_tokens: int, seed: int) -> None:
        greedy = params.is_greedy
        ROW.pack_into(
            self._host_SF[slot],
            0,
            1.0 if greedy else params.temperature,
            greedy,
            1.0 if greedy else params.top_p,
            -math.inf if greedy or not params.min_p else math.log(params.min_p),
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            self._effective_top_k(params) or self.vocab_size,
            min_tokens,
            seed,
            len(params.logit_bias or ()),
        )

    def _union(self, slots: list[int]) -> SamplingPlan:
        wanted = [self._special[slot] for slot in slots if slot in self._special]
        if not wanted:
            return GREEDY_PLAN
        plans = [flags.plan for flags in wanted]
        num_candidates = max(flags.num_candidates for flags in wanted)
        return SamplingPlan(
            all_greedy=all(plan.all_greedy for plan in plans),
            any_top_k=any(plan.any_top_k for plan in plans),
            any_top_p=any(plan.any_top_p for plan in plans),
            any_min_p=any(plan.any_min_p for plan in plans),
            num_candidates=min(bucket(num_candidates, (0, *CANDIDATE_BUCKETS), self.vocab_size), self.vocab_size),
            any_min_tokens=any(plan.any_min_tokens for plan in plans),
            any_logit_bias=any(plan.any_logit_bias for plan in plans),
            any_penalties=any(plan.any_penalties for plan in plans),
            num_logprobs=bucket(max(plan.num_logprobs for plan in plans), (-1, *LOGPROB_BUCKETS), -1),
        )

    def _effective_top_k(self, params: SamplingParams) -> int:
        """The request's top-k, or 0 where it keeps everything."""
        return params.top_k if not params.is_greedy and 0 < params.top_k < self.vocab_size else 0

    def _host_flags(self, params: SamplingParams, min_tokens: int) -> _HostFlags:
        random = not params.is_greedy
        top_k = self._effective_top_k(params)
        any_top_p = random and params.top_p < 1.0
        plan = SamplingPlan(
            all_greedy=not random,
            any_top_k=top_k > 0,
            any_top_p=any_top_p,
            any_min_p=random and params.min_p > 0.0,
            any_min_tokens=min_tokens > 0,
            any_logit_bias=bool(params.logit_bias),
            any_penalties=params.needs_penalties,
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
        )
        num_candidates = top_k or (self.vocab_size if any_top_p else 0)
        return _HostFlags(plan, num_candidates)

    def _write_stop_ids(self, slot: int, ids: torch.Tensor) -> None:
        if len(ids):
            self._stop_ids_SK[slot, : len(ids)] = ids
            self._stop_ids_SK[slot, len(ids) :] = ids[-1]

    def _write_bias(self, slot: int, ids: torch.Tensor, values: torch.Tensor) -> None:
        if len(ids):
            self._bias_ids_SB[slot, : len(ids)] = ids
            self._bias_values_SB[slot, : len(ids)] = values

    def _write_counts(self, slot: int, prompt_ids: torch.Tensor, output_ids: torch.Tensor) -> None:
        self.reserve_counts()
        row_V = self.counts_SV[slot]
        row_V.zero_()
        row_V.index_fill_(0, prompt_ids.long(), PROMPT_BIT)
        row_V.index_add_(0, output_ids.long(), torch.ones_like(output_ids))
