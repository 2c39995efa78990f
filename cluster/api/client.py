"""The seam to what is below the HTTP layer: models that turn a request into token chunks.

Implemented on Ray by the cluster and by a scripted fake in the tests. Knows nothing about HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cluster.messages import DeploymentState, GenerateRequest, ReplicaStatus
from workers.outputs import TokenChunk


class Tokenizer(Protocol):
    """What the HTTP layer needs of a model's tokenizer. Methods are called from several threads."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``."""
        ...

    def convert_id(self, token_id: int) -> str:
        """Text of one token by itself, a special one included."""
        ...

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as the model's chat template writes it, special tokens included.

        Raises:
            UserError: There is no template, or the template refuses the conversation.
        """
        ...


#: Receives the chunks of one completion in order: one for each step, several if steps came together. It must not block;
#: what it raises ends the request.
ChunkSink = Callable[[Sequence[TokenChunk]], None]


class ModelClient(Protocol):
    """One served model, whatever the number of its replicas."""

    @property
    def name(self) -> str:
        """The ``model`` of the API."""
        ...

    @property
    def created(self) -> int:
        """Unix time, in seconds, from which the model was served."""
        ...

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids from 0 up to, not including, this are valid."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None if the model is served by token ids only."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a replica is ready to serve (or, scaled to zero, would be started by a request)."""
        ...

    async def generate(self, request: GenerateRequest, on_chunks: ChunkSink) -> None:
        """Generate one completion; returns after its last chunk, the one with a ``finish_reason``.

        Chunks are pushed, not pulled: waking a task for every token costs more than all that is done with the token.
        Cancelling aborts the request and frees what it holds.

        Raises:
            QueueFullError: Every replica's queue is full.
            EngineDeadError: No replica can go on with the request.
            UserError: The engine refuses the request.
        """
        ...

    async def status(self) -> Mapping[str, ReplicaStatus]:
        """The account of each replica that answers, by replica id."""
        ...

    async def deployment_state(self) -> DeploymentState | None:
        """Whether its replicas run and start, and why not; None if nobody knows."""
        ...


class ModelDirectory(Protocol):
    """The models served here; may change while serving."""

    def lookup(self, name: str) -> ModelClient:
        """The model of that name.

        Raises:
            UnknownModelError: No such model; the message names those there are.
        """
        ...

    def models(self) -> Sequence[ModelClient]:
        """All models, in the order in which they should be listed."""
        ...
