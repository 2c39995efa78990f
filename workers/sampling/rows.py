"""The sampler's parameter table: what a slot's row holds, and a step's rows gathered from it.

Knows the layout; who writes and when is the business of :mod:`workers.sampling.state`.

Shape suffixes: R rows of a step, F fields, V vocabulary.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

import torch


class Field(enum.IntEnum):
    """Columns of the parameter table: 32-bit words, floats or integers."""

    TEMPERATURE = 0
    IS_GREEDY = 1
    TOP_P = 2
    LOG_MIN_P = 3
    REPETITION_PENALTY = 4
    PRESENCE_PENALTY = 5
    FREQUENCY_PENALTY = 6
    TOP_K = 7
    MIN_TOKENS = 8
    SEED_LOW = 9
    SEED_HIGH = 10
    NUM_LOGIT_BIAS = 11


#: A row as the host packs it: the fields in order, the seed as one number.
ROW = struct.Struct("<fi5f2iqi")
assert ROW.size == 4 * len(Field)


class SamplingRows(NamedTuple):
    """The parameters of a step's rows, gathered from the table; columns are [R, 1] to broadcast over V."""

    words_RF: torch.Tensor
    floats_RF: torch.Tensor

    def float_column(self, field: int) -> torch.Tensor:
        """float32 [R, 1]."""
        return self.floats_RF[:, field : field + 1]

    def int_column(self, field: int) -> torch.Tensor:
        """int64 [R, 1]."""
        return self.words_RF[:, field : field + 1].to(torch.int64)

    @property
    def temperature(self) -> torch.Tensor:
        """float32 [R, 1]; 1 in greedy rows."""
        return self.float_column(Field.TEMPERATURE)

    @property
    def is_greedy(self) -> torch.Tensor:
        """bool [R, 1]."""
        return self.words_RF[:, Field.IS_GREEDY : Field.IS_GREEDY + 1] != 0

    @property
    def top_p(self) -> torch.Tensor:
        """float32 [R, 1]; 1 keeps everything."""
        return self.float_column(Field.TOP_P)

    @property
    def log_min_p(self) -> torch.Tensor:
        """float32 [R, 1]: natural logarithm of min-p; -inf keeps everything."""
        return self.float_column(Field.LOG_MIN_P)

    @property
    def repetition_penalty(self) -> torch.Tensor:
        """float32 [R, 1]; 1 changes nothing."""
        return self.float_column(Field.REPETITION_PENALTY)

    @property
    def presence_penalty(self) -> torch.Tensor:
        """float32 [R, 1]."""
        return self.float_column(Field.PRESENCE_PENALTY)

    @property
    def frequency_penalty(self) -> torch.Tensor:
        """float32 [R, 1]."""
        return self.float_column(Field.FREQUENCY_PENALTY)

    @property
    def top_k(self) -> torch.Tensor:
        """int64 [R, 1] in [1, V]; V keeps everything."""
        return self.int_column(Field.TOP_K)

    @property
    def min_tokens(self) -> torch.Tensor:
        """int64 [R, 1]."""
        return self.int_column(Field.MIN_TOKENS)

    @property
    def num_logit_bias(self) -> torch.Tensor:
        """int64 [R, 1]: entries of the request's logit bias."""
        return self.int_column(Field.NUM_LOGIT_BIAS)

    @property
    def seed_R(self) -> torch.Tensor:
        """int64 [R]."""
        low_R = self.words_RF[:, Field.SEED_LOW].to(torch.int64) & 0xFFFFFFFF
        return low_R | (self.words_RF[:, Field.SEED_HIGH].to(torch.int64) << 32)
