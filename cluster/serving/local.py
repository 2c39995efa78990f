"""Running a deployment from the command line: start or join Ray, deploy, wait, shut down.

Knows the order of a start and nothing about what is deployed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import DeploymentConfig
from cluster.environment import apply_process_environment, ray_address, ray_temp_dir
from cluster.serving.proxy import proxy_environment

if TYPE_CHECKING:
    from cluster.serving.replica import EngineReplica

#: Receives the name of each phase as it begins.
PhaseListener = Callable[[str], None]


@contextlib.contextmanager
def running_deployment(
    config: DeploymentConfig, on_phase: PhaseListener, *, replica_class: type[EngineReplica] | None = None
) -> Iterator[str]:
    """Deploy ``config`` and yield its base URL once every replica is ready; shut down what was started on exit.

    Joins the cluster at ``RAY_ADDRESS`` if that is set; otherwise starts one on this machine, which ends with
    the ``with`` block.

    Args:
        config: What to run.
        on_phase: Hears of each phase of the start.
        replica_class: Runs the engines, if not :class:`EngineReplica`; for tests and benchmarks.

    Raises:
        RuntimeError: A replica failed to start; Serve's message says why.
    """
    with tempfile.TemporaryDirectory(prefix="wg-proxy-", ignore_cleanup_errors=True) as folder:
        apply_process_environment(proxy_environment(config.http.proxy, Path(folder)))
        yield from _run(config, on_phase, replica_class)


def _run(config: DeploymentConfig, on_phase: PhaseListener, replica_class: type[EngineReplica] | None) -> Iterator[str]:
    on_phase("starting Ray")
    import ray

    # Ray's processes take seconds to come up and Serve's imports one: let them overlap.
    imports = threading.Thread(target=importlib.import_module, args=("cluster.serving.application",))
    imports.start()
    address = ray_address()
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "_temp_dir": ray_temp_dir()}
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)
    imports.join()
    from ray import serve

    from cluster.serving.application import build

    application = build(config.to_dict(), *([] if replica_class is None else [replica_class]))
    try:
        on_phase("starting Serve")
        proxy = _begin_serve(config)
        on_phase("starting replicas")
        serve.run(application, name=config.name, route_prefix="/", logging_config=_logging())
        proxy.result()
        yield f"http://{config.http.host}:{config.http.port}"
    finally:
        on_phase("stopping")
        with _without_the_controllers_end():
            serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's own gap
            ray.shutdown()


def _begin_serve(config: DeploymentConfig) -> Future[Any]:
    """Start Serve; returns once its controller is there. Replicas can start while the proxy still does."""
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    executor = ThreadPoolExecutor(1)
    http_options = {"host": config.http.host, "port": config.http.port}
    started = executor.submit(serve.start, http_options=http_options, logging_config=_logging())
    executor.shutdown(wait=False)
    while not started.done():
        with contextlib.suppress(ValueError):  # it is not there yet
            ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
            break
        time.sleep(0.02)
    return started


@contextlib.contextmanager
def _without_the_controllers_end() -> Iterator[None]:
    """Keep one line of Ray's from the terminal: Serve's controller ends itself while it answers, as a failed task."""
    lines = io.StringIO()
    try:
        with contextlib.redirect_stdout(lines):
            yield
    finally:
        for line in lines.getvalue().splitlines():
            if "ServeController.graceful_shutdown failed" not in line:
                print(line)


def wait_for_signal() -> None:
    """Block until SIGINT or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(1.0):
        time.sleep(0)


def _logging() -> dict[str, Any]:
    """Logs in files, decisions of the autoscaler and starts of replicas included, but no line per request."""
    return {"log_level": "INFO", "enable_access_log": False}
