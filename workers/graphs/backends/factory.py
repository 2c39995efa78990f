"""The one place that chooses a graph backend."""

from __future__ import annotations

import torch

from workers.graphs.backends.base import GraphBackend
from workers.graphs.backends.cuda import CudaGraphBackend
from workers.graphs.backends.host import HostGraphBackend


def make_graph_backend(device: torch.device) -> GraphBackend:
    """CUDA graphs on a CUDA device, host graphs elsewhere."""
    return CudaGraphBackend(device) if device.type == "cuda" else HostGraphBackend()
