"""The device's memory at the start of an engine: what is measured, what is kept of it, what the KV cache gets.

Measures with torch; the arithmetic and what a plan looks like are :mod:`workers.runner.memory_plan`'s.

Shape suffixes: T = tokens, E = model width, R = rows, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import torch

from workers.attention.base import AttentionBackend
from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.graphs.context import ForwardContext, set_forward_context
from workers.model.decoder import DecoderForCausalLM
from workers.runner import kv_cache
from workers.runner.memory_plan import UNMEASURED_GRAPH_BYTES, MemoryPlan, MemoryPlanShelf, kv_cache_bytes

logger = logging.getLogger(__name__)


class DeviceMemory:
    """Sizes one engine's KV cache.

    Args:
        config: The engine's.
        device: Where it runs.
        shelf: Where the memory plan is kept.
    """

    def __init__(self, config: EngineConfig, device: torch.device, shelf: MemoryPlanShelf) -> None:
        self._config = config
        self._device = device
        self._shelf = shelf
        self._plan: MemoryPlan | None = None

    def num_blocks(self, model: DecoderForCausalLM, backend: AttentionBackend, max_model_len: int) -> int:
        """KV blocks that fit, by the kept plan if it applies and else by a profiling run.

        Raises:
            ConfigError: They do not suffice, or the largest step does not fit; says what to change.
        """
        config, available = self._config, None
        is_sized_by_config = config.num_gpu_blocks_override is not None or config.kv_cache_memory_bytes is not None
        if self._device.type == "cuda" and not is_sized_by_config:
            self._plan = self._kept_or_measured(model, backend)
            free, total = self._free_and_total()
            own = torch.cuda.memory_allocated(self._device)
            available = kv_cache_bytes(config.gpu_memory_utilization, total, free, own, self._plan)
        per_block = kv_cache.block_bytes(backend, model.config.num_hidden_layers)
        return kv_cache.plan_num_blocks(config, per_block, max_model_len, available)

    def keep_plan(self, graph_bytes: int) -> None:
        """Replace the guess for captured graphs by what they hold, and keep the plan if it is a new one."""
        if self._plan is not None and self._plan.graph_bytes != graph_bytes:
            self._plan = dataclasses.replace(self._plan, graph_bytes=graph_bytes)
            self._shelf.save(self._plan)

    def _kept_or_measured(self, model: DecoderForCausalLM, backend: AttentionBackend) -> MemoryPlan:
        free, _ = self._free_and_total()
        kept = self._shelf.load()
        if kept is not None and kept.applies(free):
            logger.info("memory plan: kept from an earlier start")
            return kept
        with out_of_memory("the largest step", "max_num_batched_tokens"):
            return MemoryPlan(self._peak_activations(model, backend), UNMEASURED_GRAPH_BYTES, free)

    def _free_and_total(self) -> tuple[int, int]:
        """In bytes; what PyTorch caches for reuse is free."""
        free, total = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + cached, total

    def _peak_activations(self, model: DecoderForCausalLM, backend: AttentionBackend) -> int:
        """Bytes that the largest step needs above the weights, from a forward without a cache."""
        device = self._device
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        ids_T = torch.zeros(self._config.max_num_batched_tokens, dtype=torch.int64, device=device)
        with set_forward_context(ForwardContext(backend, None, ())):
            hidden_TE = model(ids_T, ids_T)
        logits_RV = model.compute_logits(hidden_TE[: self._config.max_num_seqs])
        logits_RV.argmax(-1)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del hidden_TE, logits_RV
        torch.cuda.empty_cache()
        return peak


@contextlib.contextmanager
def out_of_memory(what: str, lower: str) -> Iterator[None]:
    """Turn the device's refusal into a sentence that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"The device has no memory for {what}; lower {lower}. ({error})") from None
