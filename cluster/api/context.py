"""What the endpoints share: the models, the settings, the metrics, and how a request becomes a generation."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence

from starlette.requests import Request

from cluster.admission.admission import Admission, Caller
from cluster.admission.deadline import TIMEOUT_HEADER
from cluster.api.client import ModelClient, ModelDirectory
from cluster.api.generation import Generation
from cluster.api.metrics import HttpMetrics
from cluster.api.prompts import PromptReader, TokenizedPrompt
from cluster.api.settings import ApiSettings
from cluster.messages import GenerateRequest
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class ApiContext:
    """Owned by the application, handed to the endpoints."""

    directory: ModelDirectory
    settings: ApiSettings
    metrics: HttpMetrics
    prompts: PromptReader
    admission: Admission

    def admit(self, request: Request) -> Caller:
        """Let a generation request in by its headers, before its body is read."""
        headers = request.headers
        return self.admission.admit(headers.get("authorization"), headers.get(TIMEOUT_HEADER))

    def check_num_choices(self, num_prompts: int, n: int) -> None:
        """Refuse a request that asks for too many completions, before any work is done for it."""
        num_choices = num_prompts * n
        if num_choices > self.settings.max_choices:
            raise InvalidRequestError(
                f"{num_prompts} prompts times n={n} are {num_choices} completions; ask for at most "
                f"{self.settings.max_choices} in one request.",
                param="n" if n > 1 else "prompt",
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """When a request came, and under which id it is answered.

    Attributes:
        id: Id of the response; ids of the completions within it are made from it.
        created: Unix time in seconds.
        started_s: ``time.perf_counter()`` at the same moment.
    """

    id: str
    created: int
    started_s: float

    @classmethod
    def now(cls, prefix: str) -> Arrival:
        """A request that has just come."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), time.perf_counter())


def start_generation(
    context: ApiContext,
    client: ModelClient,
    arrival: Arrival,
    caller: Caller,
    prompts: Sequence[TokenizedPrompt],
    params: Sequence[SamplingParams],
    *,
    discard_output: bool = False,
) -> Generation:
    """Fan out: ``n`` requests for each prompt, with the parameters of that prompt. Nothing runs until it is read."""
    requests = [
        (prompt.token_ids, single) for prompt, own in zip(prompts, params, strict=True) for single in own.fan_out()
    ]
    return Generation(
        client,
        [
            GenerateRequest(f"{arrival.id}-{index}", token_ids, single, key_name=caller.name, weight=caller.weight)
            for index, (token_ids, single) in enumerate(requests)
        ],
        params[0].n,
        context.metrics.for_model(client.name),
        arrival.started_s,
        caller,
        discard_output=discard_output,
    )
