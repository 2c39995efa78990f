"""The Serve deployment that speaks HTTP: the OpenAI API in front of one fleet per model.

Puts the API app, the fleets and the metrics together; each of them is written elsewhere.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ray
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.admission.admission import Admission
from cluster.admission.keys import KeyRing
from cluster.api.app import create_app
from cluster.api.metrics import HttpMetrics
from cluster.api.settings import ApiSettings
from cluster.config import AdmissionConfig, DeploymentConfig
from cluster.environment import api_keys
from cluster.routing.registry import load_policy
from cluster.serving.engine_metrics import render_engine_metrics
from cluster.serving.fleet import Fleet
from cluster.serving.refusals import ClusterRefusals
from cluster.serving.served_model import Directory, ServedModel
from workers.errors import ConfigError


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
            handle = handles[model.name]
            fleet = Fleet(
                handle,
                policy.choose,
                model.replicas,
                model.engine.block_size if reads_prefix else None,
                str(ray.get_runtime_context().get_node_id()),
                ClusterRefusals(handle.app_name, handle.deployment_name),
            )
            models.append(ServedModel(model, fleet))
            self._metrics.watch_queue(model.name, lambda fleet=fleet: fleet.num_held)  # type: ignore[misc]  # bound now
        self._directory = Directory(models)
        self._admission = _make_admission(self._config)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve on the replica's event loop, after the constructor."""
        for model in self._directory.models():
            model.fleet.start()
        settings = ApiSettings(
            max_body_bytes=self._config.http.max_body_bytes, stalled_client_s=self._config.http.stalled_client_timeout_s
        )
        return create_app(self._directory, self._metrics, settings, self._export_metrics, self._admission)

    async def _export_metrics(self) -> tuple[bytes, str]:
        """This ingress' own metrics and those of every replica, and their content type."""
        models = self._directory.models()
        stats = await asyncio.gather(*(model.fleet.stats() for model in models))
        by_replica = {model.name: replicas for model, replicas in zip(models, stats, strict=True)}
        own, content_type = await self._metrics.export()
        return own + render_engine_metrics(by_replica), content_type


def _make_admission(config: DeploymentConfig) -> Admission:
    admission = config.admission
    return Admission(
        _read_keys(admission),
        admission.request_timeout_s,
        admission.max_request_timeout_s,
        config.http.ingress_replicas,
    )


def _read_keys(admission: AdmissionConfig) -> KeyRing | None:
    """The API keys, from where the config says; an ingress that cannot read them does not start."""
    if admission.api_keys_file is not None:
        return KeyRing.from_file(Path(admission.api_keys_file).expanduser())
    if admission.api_keys_env is None:
        return None
    text = api_keys(admission.api_keys_env)
    if not text:
        raise ConfigError(f"admission.api_keys_env: the variable {admission.api_keys_env} is not set for the ingress.")
    return KeyRing.from_text(text)
