"""Replica states for tests of routing and serving: idle unless said otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

from cluster.messages import ReplicaState

_IDLE = ReplicaState(
    num_running=0,
    num_waiting=0,
    free_blocks=100,
    total_blocks=100,
    outstanding_tokens=0,
    tokens_to_generate=0,
    token_budget_left=64,
    cached_blocks=0,
    max_num_seqs=16,
    decode_sizes=(),
    artifact_warm=True,
    step=0,
)


def replica_state(**changes: Any) -> ReplicaState:
    """An idle replica's state with ``changes``."""
    return dataclasses.replace(_IDLE, **changes)
