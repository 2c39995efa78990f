"""From a config to a Serve application: the target of ``import_path`` in Serve's and Kubernetes' configs.

``cluster.serving.application:build`` takes a ``DeploymentConfig`` as plain data, so that the same file serves
``warmgraph serve``, ``serve deploy`` and a RayService.
"""

from __future__ import annotations

import warnings
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.autoscaling import serve_policy
from cluster.autoscaling.policy import load_scaling_policy
from cluster.config import METRICS_INTERVAL_S, DeploymentConfig, ModelDeployment, ReplicaConfig
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
        # A wrong import path is told here, not by an ingress or a controller that does not start.
        load_policy(model.routing.policy)
        if model.replicas.autoscaling is not None:
            load_scaling_policy(model.replicas.autoscaling.policy)
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
        **_scale(replicas),
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


def _scale(replicas: ReplicaConfig) -> dict[str, Any]:
    """Serve's options for a fixed number of replicas, or for one that follows the load.

    Serve's defaults take 40 s to go from one replica to two.
    """
    scaling = replicas.autoscaling
    if scaling is None:
        return {"num_replicas": replicas.num_replicas}
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]  # Ray's own gap
        policy_function=serve_policy.IMPORT_PATH,
        policy_kwargs={
            "policy": scaling.policy,
            "queue_target_s": scaling.queue_target_s,
            "utilization": scaling.utilization,
            "start_s": scaling.expected_start_s,
        },
    )
    with warnings.catch_warnings():
        # Deprecated in favour of two environment variables that Serve 2.60 does not read.
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        config = AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            initial_replicas=replicas.num_replicas,
            max_replicas=scaling.max_replicas,
            metrics_interval_s=METRICS_INTERVAL_S,
            look_back_period_s=2 * METRICS_INTERVAL_S,
            upscale_delay_s=0.0,
            downscale_delay_s=scaling.downscale_delay_s,
            downscale_to_zero_delay_s=scaling.downscale_to_zero_delay_s,
            policy=policy,
        )
    return {"autoscaling_config": config}
