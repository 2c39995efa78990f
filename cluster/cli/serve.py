"""``warmgraph serve``: run a deployment on this machine, or on the Ray cluster at RAY_ADDRESS."""

from __future__ import annotations

import json
import time

from rich.console import Console

from cluster.cli.model import import_progress
from cluster.cli.options import ConfigPath, Overrides
from cluster.config import DeploymentConfig
from cluster.models.importer import import_model
from cluster.models.registry import KNOWN_MODELS
from cluster.serving.local import running_deployment, wait_for_signal
from workers.checkpoint.cache import artifacts_root
from workers.checkpoint.resolve import resolve_model
from workers.startup.account import StartupAccount
from workers.startup.files import write_report


def serve(config: ConfigPath, overrides: Overrides = None) -> None:
    """Prepare the models, start Ray and serve the OpenAI API until Ctrl-C."""
    account = StartupAccount.of_process("warmgraph serve")
    console = Console(stderr=True, highlight=False)
    loaded = DeploymentConfig.from_file(config, overrides)
    with account.phase("models"):
        for model in loaded.models:
            _prepare(model.engine.model)
    started = time.monotonic()
    under_way: list[tuple[str, float]] = []

    def on_phase(phase: str) -> None:
        if under_way:
            account.add(*under_way.pop(), time.monotonic())
        under_way.append((phase, time.monotonic()))
        console.print(f"[dim]{time.monotonic() - started:5.1f} s[/] {phase}")

    with running_deployment(loaded, on_phase) as url:
        on_phase("ready")
        account.mark("ready")
        write_report(artifacts_root() / "startup", account.report())
        console.print(_greeting(url, loaded.models[0].name), soft_wrap=True)
        wait_for_signal()


def _prepare(model: str) -> None:
    """Import a known model, with a progress bar, unless it is in the cache; fail early for one that is not there."""
    if model in KNOWN_MODELS:
        with import_progress() as progress:
            import_model(model, progress=progress)
    else:
        resolve_model(model)


def _greeting(url: str, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]})
    return (
        f"\nServing [bold]{model}[/] at [bold]{url}/v1[/]. Try:\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n\nCtrl-C stops it."
    )
