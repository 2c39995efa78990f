"""What Serve itself says of a deployment: whether its replicas start, and why not. Knows Serve's status only."""

from __future__ import annotations

import asyncio

from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import RayServeException

from cluster.messages import DeploymentState


async def deployment_state(app_name: str, deployment: str) -> DeploymentState | None:
    """The deployment as Serve's controller sees it, or None if the controller does not say."""
    try:
        status = await asyncio.to_thread(serve.status)
    except (RayError, RayServeException):
        return None
    application = status.applications.get(app_name)
    found = None if application is None else application.deployments.get(deployment)
    if found is None:
        return None
    # Declared as members of the enum; what comes are their names.
    replicas = {ReplicaState(state).value: num for state, num in found.replica_states.items()}
    return DeploymentState(str(found.status.value), found.message, replicas)
