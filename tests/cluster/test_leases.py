"""The lease actor on a real cluster: one holder, a restart that forgets nothing, takeover of a silent owner."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil
import pytest

from tests.cluster.conftest import Deployment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]


def gcs_address(deployment: Deployment) -> str:
    """The address of the deployment's Ray cluster, from the command line of one of its processes."""
    for process in psutil.Process(deployment.process.pid).children(recursive=True):
        for argument in process.cmdline():
            if argument.startswith("--gcs-address="):
                return argument.partition("=")[2]
    raise AssertionError("no process of the deployment names its cluster")


def test_leases_of_a_cluster(deployment: Deployment) -> None:
    # A cluster that `ray.init()` starts asks for the user's token.
    environment = os.environ | {"RAY_ADDRESS": gcs_address(deployment), "RAY_AUTH_MODE": "token"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.cluster.lease_process"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "held_by": "a",
        "beat_after_restart": True,
        "held_by_after_restart": "a",
        "tokens_rise": True,
        "takeover": "built",
        "beat_after_takeover": False,
    }
