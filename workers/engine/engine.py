"""The synchronous engine core: add requests, call ``step()``, get token chunks.

Ties the scheduler, the runner and the output processor together and owns their order. Knows nothing of threads,
processes or transport.
"""

from __future__ import annotations

import collections
import itertools
import struct
import time
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from workers.checkpoint.cache import artifacts_root
from workers.checkpoint.resolve import resolve_model
from workers.config import EngineConfig
from workers.engine.output_processor import OutputProcessor
from workers.engine.stats import EngineStats
from workers.errors import InvalidRequestError, PromptTooLongError
from workers.graphs import GraphReport, HistogramStore
from workers.leases.base import LeaseService
from workers.model.config import ModelConfig
from workers.outputs import FinishReason, TokenChunk
from workers.request import Request, token_array
from workers.runner.device import resolve_max_model_len
from workers.runner.model_runner import ModelRunner, PendingStep
from workers.sampling_params import SamplingParams
from workers.scheduler.output import SchedulerOutput
from workers.scheduler.prefix_journal import PrefixChanges, PrefixJournal
from workers.scheduler.scheduler import Scheduler, SchedulerConfig
from workers.startup.account import StartupAccount
from workers.startup.beside import beside
from workers.startup.files import write_report
from workers.startup.report import StartupReport
from workers.tokenizer.tokenizer import Tokenizer


class Engine:
    """One model on one device, with continuous batching.

    Args:
        config: The engine's configuration.
        account: Where this start is written down; None begins an account here.
        leases: Who of several replicas builds what is missing; None settles that among those that share the store.
        histogram_store: Where the batch sizes seen are kept, for ``cudagraph_capture_sizes: auto``; by default with the
            compiled artifacts.

    Raises:
        ModelError: The model cannot be found or is not supported.
        ConfigError: The configuration does not fit the model or the device.
    """

    def __init__(
        self,
        config: EngineConfig,
        account: StartupAccount | None = None,
        histogram_store: HistogramStore | None = None,
        leases: LeaseService | None = None,
    ) -> None:
        self.config = config
        self._account = account = account or StartupAccount.of_process(config.model)
        folder = resolve_model(config.model)
        self.model_config = ModelConfig.from_folder(folder)
        self.max_model_len = resolve_max_model_len(config.max_model_len, self.model_config)
        tokenizer_folder = resolve_model(config.tokenizer) if config.tokenizer else folder
        tokenizer = None
        if not config.skip_tokenizer_init:
            tokenizer = beside(account, "tokenizer", lambda: Tokenizer.from_folder(tokenizer_folder))
        self.runner = ModelRunner(
            config, self.model_config, folder, self.max_model_len, account, histogram_store, leases
        )
        self.tokenizer = None if tokenizer is None else tokenizer.result()
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                block_size=config.block_size,
                num_blocks=self.runner.num_blocks,
                max_model_len=self.max_model_len,
                enable_prefix_caching=config.enable_prefix_caching,
            )
        )
        self._outputs = OutputProcessor(self.tokenizer)
        self._requests: dict[str, Request] = {}
        self._in_flight: collections.deque[tuple[SchedulerOutput, PendingStep]] = collections.deque()
        self._seeds = itertools.count(config.seed)
        self._num_steps = self._num_computed_tokens = self._num_prompt_tokens = self._num_generated_tokens = 0
        self._num_finished = self._num_aborted = 0
        self._busy_seconds = 0.0
        self._note("ready")

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        resume_token_ids: Sequence[int] = (),
        goes_first: bool = False,
    ) -> None:
        """Queue one request; ``params.n`` must be 1 (``SamplingParams.fan_out`` makes the copies).

        Args:
            request_id: Unique among live requests.
            prompt_token_ids: At least one token.
            params: Sampling parameters.
            resume_token_ids: Output tokens to continue after; they are not emitted again.
            goes_first: Queue it ahead of all that wait.

        Raises:
            InvalidRequestError: The request cannot be served as asked; says what to change.
            PromptTooLongError: The prompt leaves no room for a token.
        """
        assert params.n == 1, "fan out n > 1 above the engine"
        if request_id in self._requests:
            raise InvalidRequestError(f"request_id {request_id!r} is in use; give every request its own.")
        token_ids = self._checked(prompt_token_ids, params)
        token_ids.extend(resume_token_ids)
        room = self.max_model_len - len(prompt_token_ids)
        request = Request(
            request_id=request_id,
            token_ids=token_ids,
            num_prompt_tokens=len(prompt_token_ids),
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            eos_token_ids=frozenset() if params.ignore_eos else frozenset(self.model_config.eos_token_ids),
            arrival_time_s=time.monotonic(),
            seed=next(self._seeds) if params.seed is None else params.seed,
        )
        self.scheduler.add(request, goes_first=goes_first)
        self._requests[request_id] = request
        self._outputs.add(request)
        self._num_prompt_tokens += len(prompt_token_ids)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests now and return their blocks; ids that are not live are ignored, as they may just have ended."""
        live = [request_id for request_id in request_ids if request_id in self._requests]
        self.scheduler.abort(live)
        for request_id in live:
            del self._requests[request_id]
            self._outputs.remove(request_id)
        self._num_aborted += len(live)

    @property
    def has_unfinished(self) -> bool:
        """Whether ``step()`` has anything left to do."""
        return bool(self._in_flight) or self.scheduler.has_unfinished

    def step(self) -> list[TokenChunk]:
        """Schedule and launch one step, and collect the oldest one in flight once the pipeline is full.

        With a pipeline depth of 1 (CPU) this is the plain loop; with 2 (CUDA) the CPU schedules step n + 1 while
        the device runs step n. Both share these lines.

        Returns:
            One chunk per request that got tokens; empty if nothing could be collected yet.
        """
        started = time.perf_counter()
        self.runner.use_gap(idle=False)
        output = self.scheduler.schedule()
        if output is not None:
            self._in_flight.append((output, self.runner.execute(output)))
            self._num_steps += 1
            self._num_computed_tokens += output.num_tokens
            self.scheduler.name_blocks(output)
        chunks: list[TokenChunk] = []
        if self._in_flight and (output is None or len(self._in_flight) >= self.runner.pipeline_depth):
            chunks = self._collect(*self._in_flight.popleft())
        if not self.has_unfinished:
            self.scheduler.check_integrity()
        self._busy_seconds += time.perf_counter() - started
        return chunks

    def use_idle_time(self) -> bool:
        """Do one short piece of work that can wait (a graph capture); returns whether more may be left."""
        return self.runner.use_gap(idle=True)

    def save_traffic(self) -> None:
        """Keep the batch sizes seen for the next start; for when no further step may come."""
        self.runner.save_traffic()

    def graph_report(self) -> GraphReport:
        """What the graph layer captured, replayed and padded so far; may be read from any thread."""
        return self.runner.graph_report()

    def startup_report(self) -> StartupReport:
        """The account of this engine's start; may be read from any thread."""
        return self._account.report()

    def stats(self) -> EngineStats:
        """A snapshot of the engine's work."""
        return EngineStats(
            scheduler=self.scheduler.stats(),
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            busy_seconds=self._busy_seconds,
            decode_sizes=self.runner.decode_sizes,
            artifact_warm=self.runner.artifact_warm,
            artifacts=self.runner.library.counters.snapshot(),
            compilation=self.runner.compile_counters.snapshot(),
        )

    def follow_prefixes(self) -> None:
        """Note from now on what enters and leaves the prefix cache, for :meth:`take_prefix_changes`."""
        self.scheduler.block_pool.journal = PrefixJournal()

    def take_prefix_changes(self) -> PrefixChanges | None:
        """What changed in the prefix cache since the last call; None if nothing did, or nobody follows."""
        journal = self.scheduler.block_pool.journal
        return None if journal is None else journal.take()

    def _collect(self, output: SchedulerOutput, pending: PendingStep) -> list[TokenChunk]:
        result = pending.result()
        for request_id, prompt in result.prompt_logprobs.items():
            self._outputs.add_prompt_logprobs(request_id, prompt.first_position, prompt.positions)
        chunks, num_tokens = [], 0
        for update in self.scheduler.update(output, result.token_ids):
            request = update.request
            logprobs = result.logprobs.get(update.sample_index)
            chunk, stop_string = self._outputs.process(request, update.token_ids, logprobs)
            if stop_string is not None and not request.is_finished:
                self.scheduler.finish(request, FinishReason.STOP, stop_string)
            if chunk.finish_reason is not None:
                del self._requests[request.request_id]
                self._num_finished += 1
            num_tokens += len(update.token_ids)
            chunks.append(chunk)
        if num_tokens and not self._num_generated_tokens:
            self._note("first_token")
        self._num_generated_tokens += num_tokens
        return chunks

    def _note(self, moment: str) -> None:
        """Write a moment of the start into the account, and the account to its file."""
        self._account.mark(moment)
        if self.config.artifacts.store is not None:
            write_report(artifacts_root() / "startup", self._account.report())

    def _checked(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> array[int]:
        """The prompt, if it can be served with these parameters."""
        if not prompt_token_ids:
            raise InvalidRequestError("The prompt is empty; give at least one token.", param="prompt")
        if len(prompt_token_ids) >= self.max_model_len:
            raise PromptTooLongError(
                f"The prompt has {len(prompt_token_ids)} tokens, but the context holds {self.max_model_len}, of which "
                "at least one is for the answer; shorten the prompt.",
                param="prompt",
            )
        vocab_size = self.model_config.vocab_size
        try:
            token_ids = token_array(prompt_token_ids)
            is_known = np.frombuffer(token_ids, np.uint32).max() < vocab_size
        except (struct.error, TypeError):
            is_known = False
        if not is_known:
            raise InvalidRequestError(
                f"Token ids of the prompt must be integers between 0 and {vocab_size - 1}.", param="prompt"
            )
        params.check_vocabulary(vocab_size)
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequestError(
                "Stop strings need a tokenizer, and this engine runs without one; use stop_token_ids.", param="stop"
            )
        return token_ids
