"""An engine that computes nothing, behind the real engine thread, replica, fleet and API. Needs no torch.

Every running request gets one token per step; which one is a function of the request and the position alone, so that
a stream can be checked whatever happened to its replica.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from cluster.serving.replica import EngineReplica
from workers.engine.stats import EngineStats
from workers.graphs import (
    CapturePlan,
    CUDAGraphMode,
    GraphCounters,
    GraphDispatcher,
    GraphMemoryBudget,
    ModeResolution,
    make_report,
)
from workers.graphs.report import GraphReport
from workers.outputs import FinishReason, TokenChunk
from workers.sampling_params import SamplingParams
from workers.scheduler.output import SchedulerStats
from workers.startup.account import StartupAccount
from workers.startup.report import StartupReport

NUM_BLOCKS = 1000
VOCAB_SIZE = 257


def stub_token(prompt_token_ids: Sequence[int], position: int) -> int:
    """The token at an output position: a small letter, by its byte."""
    return _token(sum(prompt_token_ids), position)


def _token(prompt_sum: int, position: int) -> int:
    return 97 + (prompt_sum * 31 + position * 7) % 26


class StubEngine:
    """What ``EngineThread`` uses of an engine.

    Args:
        step_s: Seconds from the start of one step to the start of the next, if there is time.
    """

    max_model_len = 1 << 20

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next_step_s = 0.0
        self._live: dict[str, tuple[int, int, int]] = {}
        self.num_steps = self._num_generated = self._num_finished = self._num_aborted = 0

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        resume_token_ids: Sequence[int] = (),
        goes_first: bool = False,
    ) -> None:
        """Start a request at once."""
        assert params.max_tokens is not None
        self._live[request_id] = (sum(prompt_token_ids), len(resume_token_ids), params.max_tokens)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests."""
        for request_id in request_ids:
            self._num_aborted += self._live.pop(request_id, None) is not None

    @property
    def has_unfinished(self) -> bool:
        """Whether anything runs."""
        return bool(self._live)

    def step(self) -> list[TokenChunk]:
        """One token for everybody, when it is time."""
        now = time.monotonic()
        if self._next_step_s > now:
            time.sleep(self._next_step_s - now)
        self._next_step_s = max(self._next_step_s, now - self._step_s) + self._step_s
        self.num_steps += 1
        self._num_generated += len(self._live)
        return [self._advance(*item) for item in [*self._live.items()]]

    def follow_prefixes(self) -> None:
        """There is no prefix cache."""

    def take_prefix_changes(self) -> None:
        """None ever."""

    def save_traffic(self) -> None:
        """Nothing to save."""

    def graph_report(self) -> GraphReport:
        """Of an engine without graphs."""
        mode = CUDAGraphMode.NONE
        dispatcher = GraphDispatcher(mode, [], 1)
        return make_report(
            ModeResolution(mode, mode, None),
            dispatcher,
            GraphCounters(),
            CapturePlan([], 0),
            GraphMemoryBudget(),
            backend_name="none",
            bytes_held=0,
            sizes_from="nowhere",
        )

    def startup_report(self) -> StartupReport:
        """Of a start that took no time."""
        return StartupAccount("stub").report()

    def use_idle_time(self) -> bool:
        """There is nothing to do."""
        return False

    def stats(self) -> EngineStats:
        """As an engine's; every request holds one block."""
        num = len(self._live)
        scheduler = SchedulerStats(num, 0, NUM_BLOCKS - num, NUM_BLOCKS, num, num, 0, 0, 0, 0, 0)
        return EngineStats(
            scheduler, self.num_steps, 0, 0, self._num_generated, self._num_finished, self._num_aborted, 0.0, (), True
        )

    def _advance(self, request_id: str, live: tuple[int, int, int]) -> TokenChunk:
        prompt_sum, position, max_tokens = live
        token = _token(prompt_sum, position)
        chunk = TokenChunk(request_id, [token], chr(token))
        self._live[request_id] = (prompt_sum, position + 1, max_tokens)
        if position + 1 >= max_tokens:
            chunk.finish_reason = FinishReason.LENGTH
            self._num_finished += 1
            del self._live[request_id]
        return chunk


class StubReplica(EngineReplica):
    """A replica whose engine is a stub; ``WARMGRAPH_STUB_STEP_S`` sets its pace."""

    def _make_engine(self, account: StartupAccount) -> Any:
        return StubEngine(float(os.environ.get("WARMGRAPH_STUB_STEP_S", "0.02")))


def write_stub_model(folder: Path) -> Path:
    """A checkpoint without weights: a config, and a tokenizer with one token per byte."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": StubEngine.max_model_len,
        "eos_token_id": VOCAB_SIZE - 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate([*alphabet, "<eos>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<eos>"}))
    return folder
