"""The engine's counters, as plain data that crosses threads and processes."""

from __future__ import annotations

import dataclasses

from workers.artifacts.counters import ArtifactCounters
from workers.compile.counters import CompileCounters
from workers.scheduler.output import SchedulerStats


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's work.

    Attributes:
        scheduler: Queue lengths, blocks and counters of the scheduler.
        num_steps: Steps run.
        num_computed_tokens: Tokens that went through the model so far, prefix cache hits not among them.
        num_prompt_tokens: Prompt tokens of all requests so far.
        num_generated_tokens: Tokens emitted so far.
        num_finished: Requests that ended by themselves.
        num_aborted: Requests that were aborted.
        busy_seconds: Time spent in steps.
        decode_sizes: Batch sizes, ascending, for which a captured graph can serve a decode batch now; empty where
            batches run unpadded.
        artifact_warm: Whether the model was loaded without compiling anything.
        artifacts: What the artifact layer has done.
        compilation: What the compile layer has done.
    """

    scheduler: SchedulerStats
    num_steps: int
    num_computed_tokens: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_finished: int
    num_aborted: int
    busy_seconds: float
    decode_sizes: tuple[int, ...]
    artifact_warm: bool
    artifacts: ArtifactCounters = dataclasses.field(default_factory=ArtifactCounters)
    compilation: CompileCounters = dataclasses.field(default_factory=CompileCounters)
