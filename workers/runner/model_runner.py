"""Runs scheduled steps on the device: inputs, forward, sampling, results.

Owns the model, the KV cache and every persistent buffer. Knows tensors; which requests run, and when they end, is
decided by the scheduler.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch

from workers.artifacts.key import BundleKey
from workers.artifacts.library import ArtifactLibrary
from workers.attention.selector import make_backend
from workers.compile.compilation import BuildFlight
from workers.compile.counters import CompileCounters
from workers.config import EngineConfig
from workers.graphs import BatchDescriptor, CUDAGraphMode, GraphReport, HistogramStore
from workers.leases.base import LeaseService
from workers.model.config import ModelConfig
from workers.model.decoder import attention_spec
from workers.model.loader import load_model
from workers.modes import CompilationMode
from workers.outputs import PositionLogprobs
from workers.request import Request
from workers.runner import kv_cache
from workers.runner.ahead import begin_ahead
from workers.runner.artifacts import engine_key
from workers.runner.background_formats import BackgroundFormats
from workers.runner.buffers import HostCopies
from workers.runner.decode_batch import DecodeBatch
from workers.runner.device import resolve_device, resolve_dtype
from workers.runner.device_memory import DeviceMemory, out_of_memory
from workers.runner.flight import leases_of
from workers.runner.graphed_model import GraphedModel
from workers.runner.input_batch import InputBatch
from workers.runner.logprobs import (
    PromptLogprobsChunk,
    prompt_logprobs,
    sampled_logprobs,
    wants_prompt_logprobs,
)
from workers.runner.memory_plan import MemoryPlanShelf
from workers.runner.serving_model import ServingModel
from workers.runner.slots import SlotTable
from workers.runner.triton_kernels import TritonKernels
from workers.sampling.logprobs import LogprobsTensors
from workers.sampling.sampler import Sampler
from workers.sampling.state import SamplingState
from workers.scheduler.output import SchedulerOutput
from workers.startup.account import StartupAccount

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class StepResult:
    """What a step produced, on the host.

    Attributes:
        token_ids: One per sampled request, in the order of the schedule.
        logprobs: For sampled requests that asked: one position, by index into ``token_ids``.
        prompt_logprobs: For prefill chunks of requests that asked, by request id.
    """

    token_ids: list[int]
    logprobs: dict[int, list[PositionLogprobs]]
    prompt_logprobs: dict[str, PromptLogprobsChunk]


class PendingStep:
    """A step that was launched; :meth:`result` waits for it.

    Args:
        requests: The sampled requests, in row order.
        token_ids_R: Their tokens, on the host once ``done`` has happened.
        done: None where the device works synchronously.
        logprobs: On the device, if any of them asked.
        prompt_logprobs: Of the step's prefill chunks.
    """

    def __init__(
        self,
        requests: list[Request],
        token_ids_R: torch.Tensor,
        done: torch.cuda.Event | None,
        logprobs: LogprobsTensors | None,
        prompt_logprobs: dict[str, PromptLogprobsChunk],
    ) -> None:
        self._requests = requests
        self._token_ids_R = token_ids_R
        self._done = done
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs

    def result(self) -> StepResult:
        """Wait for the device and read the results."""
        if self._done is not None:
            self._done.synchronize()
        token_ids = self._token_ids_R.tolist()
        logprobs = {}
        if self._logprobs is not None:
            logprobs = sampled_logprobs(self._requests, token_ids, self._logprobs)
        return StepResult(token_ids, logprobs, self._prompt_logprobs)


class ModelRunner:
    """One model on one device.

    Args:
        config: The engine's configuration.
        model_config: The model's shape.
        folder: Its checkpoint.
        max_model_len: Longest context.
        account: Where this start is written down.
        leases: Who builds what is missing; None settles that among the replicas that share the store's folder.
        histogram_store: Where the batch sizes seen are kept; by default with the artifacts.

    Attributes:
        device: Where everything runs.
        library: Where compiled artifacts come from and go to.
        bundle_key: Of this engine's.
        compile_counters: What the compile layer has done for it.
        num_blocks: KV blocks allocated.
        pipeline_depth: Steps that may be in flight: 2 where the device works while the CPU schedules, else 1.

    Raises:
        ConfigError: Device, dtype, attention backend or memory do not fit the machine or the model.
        ModelError: The checkpoint is damaged or not supported.
    """

    @torch.inference_mode()
    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        folder: Path,
        max_model_len: int,
        account: StartupAccount,
        histogram_store: HistogramStore | None = None,
        leases: LeaseService | None = None,
    ) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.library = ArtifactLibrary.from_config(config.artifacts)
        with account.phase("device"):
            self.device = resolve_device(config.device)
            torch.empty(1, device=self.device)  # brings the device up
        dtype = resolve_dtype(config.dtype, model_config, self.device)
        self.pipeline_depth = 2 if self.device.type == "cuda" else 1
        spec = attention_spec(model_config, dtype, config.block_size)
        self.backend = make_backend(config.attention_backend, spec, self.device)
        self.bundle_key = engine_key(
            config, model_config, dtype=dtype, device=self.device, max_model_len=max_model_len, backend=self.backend
        )
        self._triton_kernels = _triton_kernels(config, self.device, self.library, self.bundle_key)
        if self._triton_kernels is not None:
            with account.phase("Triton kernels"):
                self._triton_kernels.restore()
        ahead = begin_ahead(
            config, model_config, self.device, dtype, self.backend, self.library, self.bundle_key, account
        )
        with account.phase("weights") as weights, out_of_memory("the weights", "the model's size or its dtype"):
            self.model = load_model(
                folder, model_config, dtype, self.device, config.load_format, config.seed, max_model_len=max_model_len
            )
            weights.num_bytes = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))
        self._slots = SlotTable(config.max_num_seqs, -(-max_model_len // config.block_size))
        self._batch = InputBatch(self._slots, config.max_num_batched_tokens, config.block_size, self.device)
        self._decode_batch = DecodeBatch(self._slots, self._batch)
        self._copies = HostCopies(config.max_num_seqs, self.device)
        self._sampling = SamplingState(config.max_num_seqs, model_config.vocab_size, self.device)
        self._sampler = Sampler(self._sampling)
        with account.phase("wait for what was begun ahead"):
            # Before memory is measured, of which the process that tries pieces takes some.
            for task in ahead:
                task.result()
        self._memory = DeviceMemory(config, self.device, MemoryPlanShelf(self.library, self.bundle_key, config))
        with account.phase("profile"):
            self.num_blocks = self._memory.num_blocks(self.model, self.backend, max_model_len)
        with account.phase("KV cache") as phase, out_of_memory("the KV cache", "gpu_memory_utilization"):
            self._kv_caches = kv_cache.allocate_kv_caches(
                self.backend, model_config.num_hidden_layers, self.num_blocks, self.device
            )
            phase.num_bytes = sum(cache.nbytes for cache in self._kv_caches)
        logger.info("KV cache: %d blocks of %d tokens", self.num_blocks, config.block_size)
        self._histogram_store, self._account = histogram_store, account
        self.compile_counters = CompileCounters()
        leases = leases or leases_of(config.artifacts)
        with account.phase("compile"):
            self._serving = ServingModel(config, self._make_graphs, leases, self.device, account)
        self._background = _background_formats(config, self.device, self.library, self.bundle_key, leases)
        with account.phase("capture"):
            self._graphs.capture_first_set()
        if not self._serving.is_temporary:
            self._memory.keep_plan(self._graphs.report().memory_bytes)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> PendingStep:
        """Launch one step; returns at once on CUDA, when it is done on a CPU."""
        slots, newcomers = self._seat(output)
        is_decode = output.num_tokens == output.num_reqs and all(item.samples for item in output.scheduled)
        mode, descriptor = self._graphs.dispatch(output, is_decode=is_decode)
        if is_decode:
            self._add_to_sampling(newcomers)
            return self._execute_decode(output, slots, mode, descriptor)
        inputs = self._batch.prepare(output, slots, descriptor.num_tokens, descriptor.num_reqs or output.num_reqs)
        prompt: dict[str, PromptLogprobsChunk] = {}
        if wants_prompt_logprobs(output):
            hidden_TE = self._graphs.run(inputs, mode, descriptor)
            prompt = prompt_logprobs(output, hidden_TE, self.model.compute_logits)
            last_RE = hidden_TE.index_select(0, inputs.geometry.last_rows())
        else:
            last_RE = self._graphs.run_for_last_rows(inputs, mode, descriptor)
        # What only sampling needs is made ready while the device runs the model.
        self._add_to_sampling(newcomers)
        rows = self._batch.prepare_sampling(output, slots)
        logits_RV = self.model.compute_logits(last_RE if rows.rows_R is None else last_RE.index_select(0, rows.rows_R))
        plan = self._sampling.plan(rows.slots)
        sampled = self._sampler.sample(logits_RV, rows.slots_R, rows.num_output_R, plan)
        self._batch.last_token_S.index_copy_(0, rows.slots_R, sampled.token_ids_R)
        return self._pending(rows.requests, sampled.token_ids_R, sampled.logprobs, prompt)

    def _execute_decode(
        self, output: SchedulerOutput, slots: list[int], mode: CUDAGraphMode, descriptor: BatchDescriptor
    ) -> PendingStep:
        """A step in which every request computes one token and samples the next."""
        inputs = self._decode_batch.prepare(output, slots, descriptor.num_tokens)
        plan = self._sampling.plan(slots)
        token_ids_R, logprobs = self._graphs.run_decode(inputs, plan, mode, descriptor)
        return self._pending([item.request for item in output.scheduled], token_ids_R, logprobs, {})

    def _pending(
        self,
        requests: list[Request],
        token_ids_R: torch.Tensor,
        logprobs: LogprobsTensors | None,
        prompt: dict[str, PromptLogprobsChunk],
    ) -> PendingStep:
        """Begin moving the step's tokens to the host."""
        host_R, done = self._copies.start(token_ids_R)
        return PendingStep(requests, host_R, done, logprobs, prompt)

    def use_gap(self, idle: bool) -> bool:
        """Use the gap between two steps, or an idle moment, for one capture; returns whether one was made.

        Compiled pieces that arrived after the start take over here, where no step is half done.
        """
        if not idle and not self._serving.is_gap_due:
            return False
        with torch.inference_mode():
            has_captured = self._serving.use_gap(idle)
        if idle and not has_captured:
            self._share_with_the_next_start()
        return has_captured

    def _share_with_the_next_start(self) -> None:
        """Nothing is left to do for this one."""
        if self._triton_kernels is not None:
            self._triton_kernels.publish_new()
        if self._background is not None and not self._serving.is_temporary:
            self._background.start()

    def wait_shared(self) -> None:
        """Return when what an idle moment began to share lies in the store, pieces of other formats excepted."""
        if self._triton_kernels is not None:
            self._triton_kernels.wait_published()

    @property
    def _graphs(self) -> GraphedModel:
        return self._serving.graphs

    def save_traffic(self) -> None:
        """Keep the batch sizes seen since the last time."""
        self._graphs.save_traffic()

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        """Batch sizes, ascending, for which a captured graph can serve a decode batch now."""
        return self._graphs.decode_sizes

    @property
    def artifact_warm(self) -> bool:
        """Whether the model was loaded without compiling anything."""
        compiled = self._graphs.compiled
        return not self._serving.is_temporary and (compiled.report.is_warm or compiled.mode is CompilationMode.NONE)

    def graph_report(self) -> GraphReport:
        """What the graph layer captured, replayed and padded so far."""
        return self._graphs.report()

    @torch.inference_mode()
    def _make_graphs(self, config: EngineConfig, flight: BuildFlight) -> GraphedModel:
        """May run on a thread of its own."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        return GraphedModel(
            config,
            self.model,
            self.backend,
            self._kv_caches,
            self._batch,
            self._decode_batch,
            self._sampler,
            self.library,
            self.bundle_key,
            flight,
            self._account,
            self.compile_counters,
            self._histogram_store,
        )

    def _seat(self, output: SchedulerOutput) -> tuple[list[int], list[tuple[int, Request]]]:
        """Free the slots of requests that left, and give newcomers one.

        Returns:
            The slot of each scheduled request, and the newcomers with theirs, of which the sampler knows nothing yet.
        """
        for slot in self._slots.drop(output.dropped_request_ids):
            self._sampling.remove(slot)
        known = self._slots.find(item.request for item in output.scheduled)
        if known is not None:
            return known, []
        slots, newcomers = [], []
        for item in output.scheduled:
            request = item.request
            slot, is_new = self._slots.seat(request)
            slots.append(slot)
            if is_new:
                self._decode_batch.forget(slot)
                newcomers.append((slot, request))
        return slots, newcomers

    def _add_to_sampling(self, newcomers: list[tuple[int, Request]]) -> None:
        for slot, request in newcomers:
            prompt = request.token_ids[: request.num_prompt_tokens]
            self._sampling.add(
                slot, request.params, prompt, request.output_token_ids, request.eos_token_ids, request.seed
            )
        self._sampling.flush()


def _background_formats(
    config: EngineConfig, device: torch.device, library: ArtifactLibrary, key: BundleKey, leases: LeaseService
) -> BackgroundFormats | None:
    """None unless the config asks for it and there is something to build and somewhere to put it."""
    artifacts = config.artifacts
    is_wanted = artifacts.build_in_background and artifacts.publish and artifacts.store is not None
    if not is_wanted or not config.compiles_pieces(device.type):
        return None
    return BackgroundFormats(config, device.type, library, key, leases)


def _triton_kernels(
    config: EngineConfig, device: torch.device, library: ArtifactLibrary, key: BundleKey
) -> TritonKernels | None:
    """Where there is a bundle that they can lie beside."""
    if device.type != "cuda" or not config.compiles_pieces(device.type) or config.artifacts.store is None:
        return None
    return TritonKernels(library, key)
