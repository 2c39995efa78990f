"""From a config to a Serve application: the target of ``import_path`` in Serve's and Kubernetes' configs.

``cluster.serving.application:build`` takes a ``DeploymentConfig`` as plain data, so that the same file serves
``warmgraph serve``, ``serve deploy`` and a RayService.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.config import DeploymentConfig, ModelDeployment
from cluster.routing.registry import load_policy
from cluster.serving.ingress import Ingress
from cluster.serving.link import SILENT_TICKS
from cluster.serving.replica import EngineReplica

IMPORT_PATH = "cluster.serving.application:build"

#: Handle calls that a process may have open: step streams, submissions and aborts, not requests.
_MAX_ONGOING_CALLS = 100_000
#: Open HTTP requests of one ingress; the engines' queues are the real bound.
_MAX_ONGOING_HTTP = 10_000


def build(args: dict[str, Any], replica_class: type[EngineReplica] = EngineReplica) -> Application:
    """The Serve application for a deployment.

    Args:
        args: A ``DeploymentConfig`` as plain data.
        replica_class: What runs the engines; tests and benchmarks put other engines into it.

    Raises:
        ConfigError: The config is wrong; says what to change.
    """
    config = DeploymentConfig.from_dict(args)
    for model in config.models:
        load_policy(model.routing.policy)  # a wrong import path is told here, not by an ingress that does not start
    engines = {model.name: _engine(model, replica_class) for model in config.models}
    ingress: Any = serve.deployment(Ingress).options(  # type: ignore[attr-defined]  # Ray's overloads lose the class
        name="ingress",
        num_replicas=config.http.ingress_replicas,
        max_ongoing_requests=_MAX_ONGOING_HTTP,
        ray_actor_options={"num_cpus": config.http.ingress_cpus},
        logging_config=LoggingConfig(enable_access_log=False),
    )
    application: Application = ingress.bind(config.to_dict(), engines)
    return application


def _engine(model: ModelDeployment, replica_class: type[EngineReplica]) -> Application:
    replicas = model.replicas
    deployment: Any = serve.deployment(replica_class).options(  # type: ignore[attr-defined]  # as above
        name=f"engine-{model.name.replace('/', '--')}",
        num_replicas=replicas.num_replicas,
        max_ongoing_requests=_MAX_ONGOING_CALLS,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        health_check_period_s=replicas.health_check_period_s,
        health_check_timeout_s=replicas.health_check_timeout_s,
        graceful_shutdown_timeout_s=replicas.graceful_shutdown_timeout_s,
        request_router_config=RequestRouterConfig(
            request_router_class="cluster.routing.pinned_router:PinnedRouter"  # type: ignore[arg-type]  # Ray's own gap
        ),
        logging_config=LoggingConfig(enable_access_log=False),
    )
    application: Application = deployment.bind(
        model.engine.model_dump(mode="json"),
        replicas.max_queued_requests,
        replicas.step_timeout_s,
        replicas.heartbeat_timeout_s / SILENT_TICKS,
        replicas.keep_spare,
    )
    return application
