"""The Serve deployment that speaks HTTP: the OpenAI API in front of one fleet per model.

Puts the API app, the fleets and the metrics together; each of them is written elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.api.app import create_app
from cluster.api.metrics import HttpMetrics
from cluster.api.settings import ApiSettings
from cluster.config import DeploymentConfig
from cluster.routing.registry import load_policy
from cluster.serving.engine_metrics import render_engine_metrics
from cluster.serving.fleet import Fleet
from cluster.serving.served_model import Directory, ServedModel


@serve.ingress()
class Ingress:
    """The HTTP side of a deployment.

    Args:
        config: A ``DeploymentConfig`` as plain data.
        handles: Handle of each model's deployment, by model name.
    """

    def __init__(self, config: dict[str, Any], handles: dict[str, DeploymentHandle[Any]]) -> None:
        self._config = DeploymentConfig.from_dict(config)
        self._metrics = HttpMetrics(CollectorRegistry())
        models = []
        for model in self._config.models:
            policy = load_policy(model.routing.policy)
            reads_prefix = policy.reads_prefix and model.engine.enable_prefix_caching
            fleet = Fleet(
                handles[model.name],
                policy.choose,
                model.replicas.start_timeout_s,
                model.replicas.heartbeat_timeout_s,
                model.engine.block_size if reads_prefix else None,
            )
            models.append(ServedModel(model, fleet))
        self._directory = Directory(models)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve on the replica's event loop, after the constructor."""
        for model in self._directory.models():
            model.fleet.start()
        settings = ApiSettings(max_body_bytes=self._config.http.max_body_bytes)
        return create_app(self._directory, self._metrics, settings, self._export_metrics)

    async def _export_metrics(self) -> tuple[bytes, str]:
        """This ingress' own metrics and those of every replica, and their content type."""
        models = self._directory.models()
        stats = await asyncio.gather(*(model.fleet.stats() for model in models))
        by_replica = {model.name: replicas for model, replicas in zip(models, stats, strict=True)}
        own, content_type = await self._metrics.export()
        return own + render_engine_metrics(by_replica), content_type
