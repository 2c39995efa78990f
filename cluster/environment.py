"""The one place where the environment is read and written.

Everything else takes its settings from the config. Knows names of variables, nothing about what they configure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

#: Variables that the processes of a deployment inherit unless the operator set them.
#: - OMP_WAIT_POLICY: several engines share cores; spinning OpenMP threads would stop each other for milliseconds.
#: - KINETO_LOG_LEVEL: torch's profiler otherwise writes two lines to standard error each time it is used.
#: - RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP: the ingress is asynchronous anyway; one loop saves a thread hop per message.
#: - RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD: neither ingress nor replica blocks its event loop, so a second loop
#:   in a second thread only adds a hop to every chunk.
#: - RAY_SERVE_LOG_TO_STDERR: logs are kept in files. Serve's buffer for them stays off: requests are not logged, and an
#:   error must be in the file before its process dies.
#: - RAY_SERVE_PROXY_USE_GRPC: Ray's Python proxy passes every chunk on; gRPC costs a little less than actor streams.
#: - RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S: a proxy that starts beside engines on a busy machine takes more than 5 s,
#:   and Serve would kill it.
#: - RAY_preload_python_modules: a spare process for the next replica (cluster/serving/spare.py).
#: - RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS: an engine that hangs will not finish anything, and its device is needed.
_PROCESS_DEFAULTS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "KINETO_LOG_LEVEL": "99",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    "RAY_preload_python_modules": "cluster.serving.preload",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def process_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The defaults above and ``more``, with whatever the operator set in their place."""
    return {name: os.environ.get(name, value) for name, value in {**_PROCESS_DEFAULTS, **(more or {})}.items()}


def apply_process_environment(more: Mapping[str, str] | None = None) -> None:
    """Export :func:`process_environment` to this process and its children; call before importing Ray."""
    os.environ.update(process_environment(more))


def api_keys(variable: str) -> str | None:
    """API keys as text, from the variable that the config names; None if it is not set."""
    return os.environ.get(variable)


def ray_temp_dir() -> str | None:
    """Where Ray puts its sockets and logs (``WARMGRAPH_RAY_TEMP_DIR``), or None for Ray's own choice."""
    return os.environ.get("WARMGRAPH_RAY_TEMP_DIR")


def ray_address() -> str | None:
    """Address of a running Ray cluster to join (``RAY_ADDRESS``), or None to start one on this machine."""
    return os.environ.get("RAY_ADDRESS")
