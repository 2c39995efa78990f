"""The whole start of an engine, from before torch is imported.

Begins first what needs no torch and takes time by itself: the CUDA driver, Triton, the process that tries stored
pieces, reading ahead in the weights. Then imports the engine and makes it. Imports torch only when called.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

from workers.checkpoint.readahead import read_ahead
from workers.checkpoint.resolve import resolve_model
from workers.compile.check_process import begun_early, note_started
from workers.config import EngineConfig
from workers.leases.base import LeaseService
from workers.startup.account import StartupAccount
from workers.startup.beside import beside
from workers.startup.cuda import device_index, has_driver, initialize_driver
from workers.startup.triton import prepare_triton

if TYPE_CHECKING:
    from workers.engine.engine import Engine


def start_engine(
    config: EngineConfig, account: StartupAccount | None = None, leases: LeaseService | None = None
) -> Engine:
    """Make an engine; see :class:`workers.engine.engine.Engine` for what it raises.

    Args:
        account: Of a start that began before; None begins one with this process.
        leases: See the engine.
    """
    account = account or StartupAccount.of_process()
    account.title = account.title or f"{config.model} on {config.device}"
    index = device_index(config.device)
    if index is not None and "torch" not in sys.modules:
        # Where torch has been imported the caller may have chosen another device with it.
        beside(account, "CUDA driver", functools.partial(initialize_driver, index))
        if has_driver():
            beside(account, "Triton", prepare_triton)
    with begun_early(config):
        with account.phase("read ahead") as phase:
            folder = resolve_model(config.model)
            if config.load_format != "dummy":
                phase.num_bytes = read_ahead(folder)
        with account.phase("imports"):
            from workers.engine.engine import Engine
        engine = Engine(config, account, leases=leases)
    if engine.runner.artifact_warm:
        note_started(config)
    return engine
