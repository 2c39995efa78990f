"""An engine held in steady decode: a batch of a chosen size, every request past its prompt, one token each per step.

Knows how to get there and how to time steps; knows nothing about what is compared.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from workers.analysis.costs import synchronize
from workers.analysis.sizes import configured_sizes
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.errors import ConfigError
from workers.sampling_params import SamplingParams

#: Steps between the last prefill and the first timed step.
_WARM_UP_STEPS = 3

#: Steps in flight when the last one is timed, and room for what was not thought of.
_SLACK_STEPS = 8


def analysis_config(
    config: EngineConfig, batches: Sequence[int], context: int, num_steps: int, **changes: Any
) -> EngineConfig:
    """The same engine, as far as a decode of these batches needs it: no tokenizer, no prefix cache, a small KV cache.

    Args:
        batches: Batch sizes that will run; the graphs that serve them are captured before the engine is ready.
        context: Prompt tokens of each request.
        num_steps: Most steps that one batch is held for.
        changes: Fields to change, ``compilation_config`` by its own fields.

    Raises:
        ConfigError: A batch or the context is more than the config allows.
    """
    if max(batches) > config.max_num_seqs:
        raise ConfigError(
            f"batch {max(batches)} is above max_num_seqs={config.max_num_seqs}; ask for smaller batches or raise it.",
            param="max_num_seqs",
        )
    fields = config.model_dump(exclude_unset=True)
    compilation = fields.pop("compilation_config", {}) | changes.pop("compilation_config", {})
    compilation |= {
        "cudagraph_capture_sizes": _capture_sizes(config, batches),
        "max_cudagraph_capture_size": None,
        "cudagraph_first_sizes": "all",
    }
    length = context + _output_tokens(config, max(batches), context, num_steps)
    fields |= {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "num_gpu_blocks_override": max(batches) * (-(-length // config.block_size) + 1) + 1,
    }
    return EngineConfig.create(**(fields | {"compilation_config": compilation} | changes))


def _capture_sizes(config: EngineConfig, batches: Sequence[int]) -> list[int]:
    """Of the sizes that the config captures, those that serve these batches."""
    sizes = configured_sizes(config)
    return sorted({next((size for size in sizes if size >= batch), sizes[-1]) for batch in batches})


def _output_tokens(config: EngineConfig, batch: int, context: int, num_steps: int) -> int:
    """Tokens that the first request of a batch gets at most, from its own prefill to the last step."""
    prefill_budget = max(1, config.max_num_batched_tokens - batch)
    num_prefill_steps = -(-batch * context // prefill_budget) + 1
    return num_prefill_steps + _WARM_UP_STEPS + num_steps + _SLACK_STEPS


class DecodeSession:
    """One engine, for as long as it is measured.

    Args:
        config: From :func:`analysis_config`.
        context: Prompt tokens of each request.
    """

    def __init__(self, config: EngineConfig, context: int) -> None:
        self.engine = Engine(config)
        self.device = self.engine.runner.device
        self._context = context
        self._ids = itertools.count()
        self._batch = self._generated_before = 0

    @contextlib.contextmanager
    def holding(self, batch: int, num_steps: int) -> Iterator[None]:
        """Inside, the engine has ``batch`` running requests that decode for ``num_steps`` steps and more.

        Raises:
            ConfigError: ``max_model_len`` is too small for that.
        """
        engine = self.engine
        self._batch, self._generated_before = batch, engine.stats().num_generated_tokens
        generator = random.Random(batch)
        vocab_size = engine.model_config.vocab_size
        max_tokens = _output_tokens(engine.config, batch, self._context, num_steps)
        if self._context + max_tokens > engine.max_model_len:
            raise ConfigError(
                f"{self._context} tokens of context and {max_tokens} of output are more than max_model_len="
                f"{engine.max_model_len}; ask for less context or fewer steps.",
                param="max_model_len",
            )
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        request_ids = []
        for _ in range(batch):
            request_id = str(next(self._ids))
            prompt = [generator.randrange(vocab_size) for _ in range(self._context)]
            engine.add_request(request_id, prompt, params)
            request_ids.append(request_id)
        try:
            while self._is_prefilling():
                engine.step()
            self.steps(_WARM_UP_STEPS)
            yield
        finally:
            engine.abort(request_ids)
            while engine.has_unfinished:
                engine.step()

    def steps(self, count: int) -> float:
        """Run steps; returns the seconds that one of them takes, device included."""
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(count):
            self.engine.step()
        synchronize(self.device)
        seconds = (time.perf_counter() - started) / count
        assert self.engine.scheduler.stats().num_running == self._batch, "a request ended or was preempted meanwhile"
        return seconds

    def mode_counts(self) -> collections.Counter[str]:
        """Batches run so far, by runtime mode of the graph layer."""
        return collections.Counter(self.engine.runner.graph_report().batches)

    def mean_context(self) -> float:
        """Cached tokens of a request of the batch that is held, averaged over the time since it began."""
        generated = self.engine.stats().num_generated_tokens - self._generated_before
        return self._context + generated / self._batch / 2

    def close(self) -> None:
        """Give the engine's memory back."""
        del self.engine
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _is_prefilling(self) -> bool:
        stats = self.engine.scheduler.stats()
        return stats.num_waiting > 0 or stats.num_outstanding_tokens > stats.num_running
