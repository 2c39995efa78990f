"""Messages between ingress and replica, in one place. Plain dataclasses, pickled by Ray.

A request travels as :class:`GenerateRequest`; tokens come back as one :class:`StepMessage` per engine step and
ingress, which carries every request's chunk and the replica's state, because a message costs hundreds of
microseconds whatever its size. Knows nothing about Ray, HTTP or tensors.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from workers.outputs import TokenChunk
from workers.sampling_params import SamplingParams
from workers.scheduler.prefix_journal import PrefixChanges

if TYPE_CHECKING:
    from workers.graphs.report import GraphReport
    from workers.startup.report import StartupReport


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One completion of one prompt. Filled by the API layer; ``params.n`` is 1.

    Attributes:
        request_id: Unique in the cluster.
        prompt_token_ids: The prompt.
        params: Sampling parameters.
        resume_token_ids: Output tokens that an earlier replica already produced and that the client has: they
            are not produced again, and sampling goes on after them.
        attempt: How many replicas were lost under this request. One that was lost goes ahead of newcomers and is
            taken beyond the queue's bound: its client has waited already.
        key_name: Whose API key it came with; "" without keys. Keys share the queue fairly.
        weight: The key's share.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    resume_token_ids: tuple[int, ...] = ()
    attempt: int = 0
    key_name: str = ""
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaState:
    """A replica's load after a step. Filled by the engine thread, read by routing policies.

    Attributes:
        num_running: Requests in the batch.
        num_waiting: Requests queued for it.
        free_blocks: KV blocks that are free or hold only evictable cached prefixes.
        total_blocks: KV blocks in all.
        outstanding_tokens: Prompt tokens still to compute plus one per running request: the work queued.
        tokens_to_generate: Most tokens that its requests may still produce.
        token_budget_left: Tokens of a step's budget that the last step left unused.
        cached_blocks: KV blocks whose content a prompt can share.
        max_num_seqs: Most requests in a batch.
        decode_sizes: Batch sizes, ascending, that a decode batch is padded to; empty where batches are not padded.
        artifact_warm: Whether the replica started without compiling.
        step: Number of the engine step that this describes.
    """

    num_running: int
    num_waiting: int
    free_blocks: int
    total_blocks: int
    outstanding_tokens: int
    tokens_to_generate: int
    token_budget_left: int
    cached_blocks: int
    max_num_seqs: int
    decode_sizes: tuple[int, ...]
    artifact_warm: bool
    step: int


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixUpdate:
    """What a reader must do to know which prefix blocks a replica holds.

    Attributes:
        changes: Names that came and went; see :mod:`workers.scheduler.prefix_journal`.
        is_snapshot: ``changes.added`` is all there is: forget what was known before.
    """

    changes: PrefixChanges
    is_snapshot: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class StepMessage:
    """What one or, to a slow reader, several engine steps produced for one ingress.

    Attributes:
        chunks: In order; a request may appear more than once if the reader fell behind. None in a heartbeat.
        state: The replica's state after the last of them.
        prefixes: News of its prefix cache, if there are any; a snapshot in the first message.
    """

    chunks: list[TokenChunk]
    state: ReplicaState
    prefixes: PrefixUpdate | None = None

    def __reduce__(self) -> tuple[object, ...]:
        # By columns: a message has a chunk for every running request, and pickling them one by one costs three times
        # as much at either end.
        chunks = self.chunks
        columns = (
            [chunk.request_id for chunk in chunks],
            [chunk.token_ids for chunk in chunks],
            [chunk.text for chunk in chunks],
        )
        more = {position: chunk.rest for position, chunk in enumerate(chunks) if not chunk.is_plain}
        return _restore_step, (columns, more, self.state, self.prefixes)


def _restore_step(
    columns: tuple[list[str], list[list[int]], list[str]],
    more: dict[int, tuple[Any, ...]],
    state: ReplicaState,
    prefixes: PrefixUpdate | None,
) -> StepMessage:
    chunks = [*map(TokenChunk, *columns)]
    for position, rest in more.items():
        chunks[position] = TokenChunk(*(column[position] for column in columns), *rest)  # type: ignore[arg-type]  # in order
    return StepMessage(chunks, state, prefixes)


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica's account of itself, for operators.

    Attributes:
        state: Its load after the last step.
        graphs: What its graph layer captured, replayed and padded.
        startup: How it started.
    """

    state: ReplicaState
    graphs: GraphReport
    startup: StartupReport

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return {**dataclasses.asdict(self), "startup": self.startup.to_dict()}


@dataclasses.dataclass(frozen=True, slots=True)
class IngressLoad:
    """What an ingress holds back and what comes in, for autoscaling. Filled by the fleet.

    Attributes:
        num_held: Requests that wait for a place at a replica.
        held_prompt_tokens: Their prompts.
        held_output_tokens: What they will probably generate.
        prompt_tokens_per_s: Prompt tokens that come in, held or not.
        output_tokens_per_s: Tokens to generate that come in, probably.
        output_ratio: What requests generate of their ``max_tokens``, on average.
        has_arrivals: 1 if a request came in within the last second, else 0.
    """

    num_held: float = 0.0
    held_prompt_tokens: float = 0.0
    held_output_tokens: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    output_ratio: float = 1.0
    has_arrivals: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class DeploymentState:
    """What Serve says of a model's deployment, for operators.

    Attributes:
        status: ``HEALTHY``, ``UPDATING``, ``UNHEALTHY``, ``DEPLOY_FAILED``, ...
        message: Why, if it is not healthy: of a constructor that fails, its error.
        replicas: Number of replicas by state: ``RUNNING``, ``STARTING``, ...
    """

    status: str
    message: str
    replicas: dict[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class SubmitReply:
    """A replica's answer to a submission.

    Attributes:
        accepted: Whether the request was queued.
        retry_after_s: If not accepted because the queue is full: when to try again.
        error: If not accepted because the request is wrong: one sentence.
        param: The parameter at fault, if any.
    """

    accepted: bool
    retry_after_s: float | None = None
    error: str | None = None
    param: str | None = None
