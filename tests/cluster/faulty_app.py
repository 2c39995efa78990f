"""Deploys a second application, of stub engines that fail on demand, to a running Ray cluster; then exits.

It asks for API keys.

Usage: python -m tests.cluster.faulty_app ADDRESS FOLDER

What a prompt says is what happens in the step that includes it; what lies in the model's folder decides whether an
engine can be built at all.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve

from benchmarks.stub_engine import StubEngine, StubReplica, write_stub_model
from cluster.serving.application import build
from workers.outputs import TokenChunk
from workers.startup.account import StartupAccount

NAME = "faulty"
#: API keys by name.
KEYS = {"quiet": "sk-quiet", "flood": "sk-flood"}
#: Full batch of each replica.
MAX_NUM_SEQS = 4
POISON, FREEZE, RAISE = b"poison", b"freeze", b"raise"
#: While a file of this name lies in the model's folder, no engine can be built.
BROKEN = "broken"
STEP_TIMEOUT_S = 3.0


class FaultyEngine(StubEngine):
    """Dies, hangs or raises at the fifth token of a prompt that asks for it."""

    def __init__(self, step_s: float) -> None:
        super().__init__(step_s)
        self._prompts: dict[str, bytes] = {}

    def add_request(self, request_id: str, prompt_token_ids: Sequence[int], *args: Any, **kwargs: Any) -> None:
        """As the stub's, and keep what is asked for."""
        self._prompts[request_id] = bytes(prompt_token_ids)
        super().add_request(request_id, prompt_token_ids, *args, **kwargs)

    def _advance(self, request_id: str, live: tuple[int, int, int]) -> TokenChunk:
        if live[1] == 5:
            text = self._prompts[request_id]
            if text == POISON:
                os._exit(1)
            if text == RAISE:
                raise RuntimeError("the device fell off the bus")
            if text.startswith(FREEZE) and not (marker := Path(text.decode()[len(FREEZE) :])).exists():
                marker.touch()
                time.sleep(3600)
        return super()._advance(request_id, live)


class FaultyReplica(StubReplica):
    """A replica of such an engine."""

    def _make_engine(self, account: StartupAccount) -> Any:
        if (Path(self._config.model) / BROKEN).exists():
            raise RuntimeError("this engine cannot be built")
        return FaultyEngine(0.02)


def main() -> None:
    """Deploy and return once the replicas are there."""
    address, folder = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    replicas = {
        "num_replicas": 3,
        "num_cpus": 0.1,
        "health_check_period_s": 0.5,
        "step_timeout_s": STEP_TIMEOUT_S,
        "heartbeat_timeout_s": 8,
    }
    engine = {"model": str(write_stub_model(Path(folder))), "device": "cpu", "max_num_seqs": MAX_NUM_SEQS}
    keys = Path(folder) / "keys.yaml"
    keys.write_text(yaml.safe_dump({"keys": [{"name": name, "key": key} for name, key in KEYS.items()]}))
    config = {
        "name": NAME,
        "models": [{"name": NAME, "engine": engine, "replicas": replicas}],
        "admission": {"api_keys_file": str(keys)},
    }
    serve.run(build(config, FaultyReplica), name=NAME, route_prefix=f"/{NAME}")


if __name__ == "__main__":
    main()
