"""Serve's word about a deployment, from the details that its controller sends."""

from __future__ import annotations

from typing import Any

import pytest
import ray.exceptions
from ray import serve
from ray.serve.schema import ServeInstanceDetails

from cluster.messages import DeploymentState
from cluster.serving.serve_state import deployment_state


def details() -> ServeInstanceDetails:
    """Of one deployment: two replicas run, one starts and cannot."""
    states = ["RUNNING", "RUNNING", "STARTING"]
    deployment = {
        "name": "engine-tiny",
        "status": "UNHEALTHY",
        "status_trigger": "REPLICA_STARTUP_FAILED",
        "message": "The constructor raised.",
        "deployment_config": {"name": "engine-tiny"},
        "target_num_replicas": 3,
        "required_resources": {},
        "replicas": [{"replica_id": str(n), "state": state, "start_time_s": 0.0} for n, state in enumerate(states)],
    }
    application = {
        "name": "app",
        "route_prefix": "/",
        "docs_path": None,
        "status": "RUNNING",
        "message": "",
        "last_deployed_time_s": 0.0,
        "source": "imperative",
        "external_scaler_enabled": False,
        "deployments": {"engine-tiny": deployment},
    }
    return ServeInstanceDetails.model_validate(
        {"controller_info": {}, "proxies": {}, "target_capacity": None, "applications": {"app": application}}
    )


async def test_state_is_what_serve_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "status", details()._get_status)
    expected = DeploymentState("UNHEALTHY", "The constructor raised.", {"RUNNING": 2, "STARTING": 1})
    assert await deployment_state("app", "engine-tiny") == expected
    assert await deployment_state("app", "engine-other") is None
    assert await deployment_state("other", "engine-tiny") is None


async def test_a_controller_that_does_not_answer_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise ray.exceptions.RayActorError()

    monkeypatch.setattr(serve, "status", fail)
    assert await deployment_state("app", "engine-tiny") is None
