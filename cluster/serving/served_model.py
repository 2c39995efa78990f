"""One served model as the API layer sees it: a name, a tokenizer, and a fleet that generates.

Implements ``cluster.api.client``'s seam on top of a :class:`Fleet`. Knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from cluster.api.client import ChunkSink
from cluster.config import ModelDeployment
from cluster.messages import DeploymentState, GenerateRequest, ReplicaStatus
from cluster.serving.fleet import Fleet
from workers.checkpoint.resolve import resolve_model
from workers.errors import UnknownModelError
from workers.model.config import ModelConfig
from workers.tokenizer.tokenizer import Tokenizer


class ServedModel:
    """A model of the deployment, on this ingress.

    Args:
        deployment: The model's part of the config.
        fleet: Its replicas.

    Raises:
        ModelError: The checkpoint cannot be found on the ingress' node, or has no tokenizer.
    """

    def __init__(self, deployment: ModelDeployment, fleet: Fleet) -> None:
        engine = deployment.engine
        folder = resolve_model(engine.model)
        config = ModelConfig.from_folder(folder)
        self.name = deployment.name
        self.created = int(time.time())
        self.max_model_len = engine.max_model_len or config.max_position_embeddings
        self.vocab_size = config.vocab_size
        self.tokenizer: Tokenizer | None = None
        if not engine.skip_tokenizer_init:
            self.tokenizer = Tokenizer.from_folder(resolve_model(engine.tokenizer) if engine.tokenizer else folder)
        self.fleet = fleet
        autoscaling = deployment.replicas.autoscaling
        self._starts_on_demand = autoscaling is not None and autoscaling.min_replicas == 0

    @property
    def is_ready(self) -> bool:
        """Whether a replica is connected, or would be started by a request."""
        return self._starts_on_demand or bool(self.fleet.snapshots)

    async def generate(self, request: GenerateRequest, on_chunks: ChunkSink) -> None:
        """Generate one completion on a replica; see :meth:`Fleet.generate`."""
        await self.fleet.generate(request, on_chunks)

    async def status(self) -> dict[str, ReplicaStatus]:
        """Every connected replica's account of itself, by replica id."""
        return await self.fleet.status()

    async def deployment_state(self) -> DeploymentState | None:
        """What Serve says of the replicas."""
        return await self.fleet.deployment_state()


class Directory:
    """The models of a deployment, by the name that requests give."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def models(self) -> Sequence[ServedModel]:
        """All models, in the order of the config."""
        return list(self._models.values())

    def lookup(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
            UnknownModelError: No such model; the message names those there are.
        """
        model = self._models.get(name)
        if model is None:
            served = ", ".join(repr(known) for known in self._models)
            raise UnknownModelError(f"The model {name!r} is not served here; use {served}.", param="model")
        return model
