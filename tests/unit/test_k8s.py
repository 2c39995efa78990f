"""The RayService manifest: Ray's own schema must accept its Serve config, and it must say what the config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import DeploymentConfig
from cluster.k8s import ray_service

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def config() -> DeploymentConfig:
    return DeploymentConfig.from_file(REPOSITORY / "configs" / "smollm2-cpu.yaml")


@pytest.fixture
def manifest(config: DeploymentConfig) -> dict[str, Any]:
    return ray_service(config, image="registry.example/warmgraph:1")


def test_ray_accepts_the_serve_config(manifest: dict[str, Any], config: DeploymentConfig) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    assert application.import_path == "cluster.serving.application:build"
    assert DeploymentConfig.from_dict(application.args) == config


def test_pods_carry_image_environment_and_resources(manifest: dict[str, Any]) -> None:
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "registry.example/warmgraph:1"
        assert {"name": "OMP_WAIT_POLICY", "value": "PASSIVE"} in container["env"]
        assert container["resources"]["requests"]["memory"].endswith("Gi")
    assert cluster["workerGroupSpecs"][0]["replicas"] == 2


def test_gpus_are_asked_for(config: DeploymentConfig) -> None:
    data = config.to_dict()
    data["models"][0]["replicas"]["num_gpus"] = 0.5
    manifest = ray_service(DeploymentConfig.from_dict(data), image="i")
    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_groups_scale_with_their_models(config: DeploymentConfig) -> None:
    data = config.to_dict()
    data["models"][0]["replicas"]["autoscaling"] = {"min_replicas": 0, "max_replicas": 5}
    cluster = ray_service(DeploymentConfig.from_dict(data), image="i")["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    ingress, engine = cluster["workerGroupSpecs"]
    assert (ingress["groupName"], ingress["minReplicas"], ingress["maxReplicas"]) == ("ingress", 1, 1)
    assert (engine["minReplicas"], engine["replicas"], engine["maxReplicas"]) == (0, 2, 5)


def test_fixed_groups_ask_for_no_autoscaler(manifest: dict[str, Any]) -> None:
    assert "enableInTreeAutoscaling" not in manifest["spec"]["rayClusterConfig"]


@pytest.mark.parametrize("name", ["smollm2-cpu", "two-models-cpu"])
def test_the_shipped_manifest_is_up_to_date(name: str) -> None:
    shipped = REPOSITORY / "k8s" / f"rayservice-{name}.yaml"
    config = DeploymentConfig.from_file(REPOSITORY / "configs" / f"{name}.yaml")
    assert yaml.safe_load(shipped.read_text()) == ray_service(config, image="warmgraph:0.1.0")
