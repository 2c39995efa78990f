"""Sampling on the device, vectorised over the batch."""

from workers.sampling.logprobs import LogprobsLists, LogprobsTensors, compute_logprobs
from workers.sampling.plan import GREEDY_PLAN, SamplingPlan
from workers.sampling.sampler import Sampler, SamplerOutput
from workers.sampling.state import SamplingState

__all__ = [
    "GREEDY_PLAN",
    "LogprobsLists",
    "LogprobsTensors",
    "Sampler",
    "SamplerOutput",
    "SamplingPlan",
    "SamplingState",
    "compute_logprobs",
]
