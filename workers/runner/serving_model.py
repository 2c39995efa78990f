"""Which form of the model serves: the compiled one, or the eager one until compiled pieces arrive.

Knows when one takes over from the other. What a form consists of is :class:`GraphedModel`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from workers.compile.compilation import BuildFlight
from workers.config import EngineConfig
from workers.leases.base import LeaseService
from workers.runner.flight import PieceFlight
from workers.runner.graphed_model import GraphedModel
from workers.runner.incoming import Incoming
from workers.startup.account import StartupAccount

logger = logging.getLogger(__name__)

#: Makes a form of the model, compiled as the config says.
MakeGraphs = Callable[[EngineConfig, BuildFlight], GraphedModel]


class ServingModel:
    """Owns the form that serves.

    Args:
        config: The engine's; ``artifacts.serve_meanwhile`` decides whether the start waits for a build.
        make: Makes a form; called on a thread of its own if the start does not wait.
        leases: Who builds what is missing.
        device: Where it runs.
        account: Where this start is written down.

    Attributes:
        graphs: The form that serves now.
    """

    def __init__(
        self,
        config: EngineConfig,
        make: MakeGraphs,
        leases: LeaseService,
        device: torch.device,
        account: StartupAccount,
    ) -> None:
        self._account = account
        self._device = device
        self._incoming: Incoming[GraphedModel] | None = None
        wait_s = config.artifacts.build_wait_s
        if not config.artifacts.serve_meanwhile:
            self.graphs = make(config, PieceFlight(leases, wait_s, account))
            return
        incoming = Incoming(lambda on_miss: make(config, PieceFlight(leases, wait_s, account, on_miss)), account)
        if incoming.wait_for_hit():
            self.graphs = incoming.result()
            return
        self._incoming = incoming
        logger.info("serving eagerly until compiled pieces arrive")
        eager = config.model_copy(update={"enforce_eager": True})
        self.graphs = make(eager, PieceFlight(leases, wait_s, account))

    @property
    def is_gap_due(self) -> bool:
        """Whether a gap between two steps of a busy engine has a use."""
        return self._has_arrived() or self.graphs.is_gap_due

    @property
    def is_temporary(self) -> bool:
        """Whether the eager model serves until compiled pieces arrive."""
        return self._incoming is not None

    def use_gap(self, idle: bool) -> bool:
        """Use the gap between two steps: let pieces that have arrived take over, or make one capture.

        Args:
            idle: See :meth:`GraphedModel.use_gap`, as for the result.
        """
        return self._take_over() if self._has_arrived() else self.graphs.use_gap(idle)

    def _has_arrived(self) -> bool:
        return self._incoming is not None and self._incoming.is_done

    def _take_over(self) -> bool:
        """The graphs of what arrived are captured in gaps, as traffic needs them."""
        incoming, self._incoming = self._incoming, None
        assert incoming is not None
        try:
            graphs = incoming.result()
        except Exception:
            # Serving goes on as it is, and says so.
            logger.exception("compiled pieces could not be had; the model stays eager")
            return False
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.graphs.release()
        self.graphs = graphs
        self._account.mark("swapped")
        logger.info("compiled pieces take over from the eager model")
        return True
