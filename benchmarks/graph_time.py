"""What calls take on a CUDA device, without the host's part: inside one captured graph."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch


def time_graph(calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Microseconds per call, median over replays of one graph that holds them all."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    make_event: Any = torch.cuda.Event
    events = [make_event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times: list[float] = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(times) / len(calls) * 1e3
