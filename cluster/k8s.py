"""A RayService manifest from a deployment config. Knows Kubernetes' and KubeRay's shapes, talks to no cluster."""

from __future__ import annotations

import math
from typing import Any

import yaml

from cluster.config import DeploymentConfig, HttpConfig, ModelDeployment
from cluster.environment import process_environment

#: Built from this repository; operators push it under a name of their own.
DEFAULT_IMAGE = "warmgraph:0.1.0"
_RAY_VERSION = "2.60.0"
_IMPORT_PATH = "cluster.serving.application:build"
_GIB = 2**30
#: Memory of an engine process beyond weights and KV cache, in bytes: torch, Ray, activations.
_ENGINE_OVERHEAD = 3 * _GIB
_HEAD_RESOURCES = {"cpu": "2", "memory": "4Gi"}


def serve_config(config: DeploymentConfig) -> dict[str, Any]:
    """The deployment in Ray Serve's own config format (``serve deploy``, ``ServeDeploySchema``)."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": config.http.port},
        "applications": [
            {
                "name": config.name,
                "route_prefix": "/",
                "import_path": _IMPORT_PATH,
                "args": config.to_dict(),
            }
        ],
    }


def ray_service(config: DeploymentConfig, image: str) -> dict[str, Any]:
    """A KubeRay ``RayService`` with one worker group per model.

    Where a model scales, its group does too, and Ray's autoscaler adds and removes its pods; the ingress then has a
    group of its own, so that it does not keep an engine's pod alive.

    Args:
        config: The deployment.
        image: Container image with warmgraph installed and the models in its cache or on a volume.
    """
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": config.name},
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve_config(config), sort_keys=False),
            "rayClusterConfig": {
                "rayVersion": _RAY_VERSION,
                "headGroupSpec": {
                    "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
                    "template": _pod("ray-head", image, _HEAD_RESOURCES, _HEAD_RESOURCES, config.http),
                },
                **({"enableInTreeAutoscaling": True} if any(m.replicas.autoscaling for m in config.models) else {}),
                "workerGroupSpecs": [*_ingress_groups(config, image), *_engine_groups(config, image)],
            },
        },
    }


def to_yaml(manifest: dict[str, Any]) -> str:
    """The manifest as YAML, texts of several lines as blocks that a person can read."""
    return yaml.dump(manifest, Dumper=_BlockDumper, sort_keys=False)


class _BlockDumper(yaml.SafeDumper):
    """Writes strings with line breaks in YAML's literal style."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_BlockDumper.add_representer(str, _represent_text)


def _engine_groups(config: DeploymentConfig, image: str) -> list[dict[str, Any]]:
    return [_worker_group(model, image, config) for model in config.models]


def _ingress_groups(config: DeploymentConfig, image: str) -> list[dict[str, Any]]:
    if not any(model.replicas.autoscaling for model in config.models):
        return []  # it lives beside the engines
    resources = {"cpu": str(max(1, math.ceil(config.http.ingress_cpus))), "memory": "2Gi"}
    return [
        {
            "groupName": "ingress",
            "replicas": config.http.ingress_replicas,
            "minReplicas": config.http.ingress_replicas,
            "maxReplicas": config.http.ingress_replicas,
            "rayStartParams": {},
            "template": _pod("ray-worker", image, resources, resources, config.http),
        }
    ]


def _worker_group(model: ModelDeployment, image: str, config: DeploymentConfig) -> dict[str, Any]:
    replicas, scaling = model.replicas, model.replicas.autoscaling
    cpus = max(1, math.ceil(replicas.num_cpus + config.http.ingress_cpus))
    memory = _ENGINE_OVERHEAD + (model.engine.kv_cache_memory_bytes or _GIB)
    requests = {"cpu": str(cpus), "memory": f"{math.ceil(memory / _GIB)}Gi"}
    limits = dict(requests)
    if replicas.num_gpus:
        limits["nvidia.com/gpu"] = str(math.ceil(replicas.num_gpus))
    return {
        "groupName": "engine-" + "".join(c if c.isalnum() else "-" for c in model.name.lower()),
        "replicas": replicas.num_replicas,
        "minReplicas": scaling.min_replicas if scaling else replicas.num_replicas,
        "maxReplicas": scaling.max_replicas if scaling else replicas.num_replicas,
        "rayStartParams": {},
        "template": _pod("ray-worker", image, requests, limits, config.http),
    }


def _pod(name: str, image: str, requests: dict[str, str], limits: dict[str, str], http: HttpConfig) -> dict[str, Any]:
    # HAProxy has not been tried on Kubernetes: there it must be asked for.
    environment = process_environment({"RAY_SERVE_ENABLE_HA_PROXY": "1"} if http.proxy == "haproxy" else None)
    return {
        "spec": {
            "containers": [
                {
                    "name": name,
                    "image": image,
                    "env": [{"name": key, "value": value} for key, value in sorted(environment.items())],
                    "ports": [{"name": "serve", "containerPort": http.port}],
                    "resources": {"requests": requests, "limits": limits},
                }
            ]
        }
    }
