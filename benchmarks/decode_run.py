"""A fixed decode batch for benchmarks of the compile layer: a model with dummy weights, its attention and caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workers.attention.base import BatchGeometry, Rope
from workers.attention.selector import make_backend
from workers.graphs.context import ForwardContext, set_forward_context
from workers.model.config import ModelConfig
from workers.model.loader import load_model

NUM_REQUESTS, PROMPT_LEN, NUM_STEPS, BLOCK_SIZE = 4, 32, 16, 16


class Clock:
    """Seconds between marks, with the device's work waited for."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.laps: dict[str, float] = {}
        self._synchronize = synchronize
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Everything since the last mark is called ``name``."""
        self._synchronize()
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 4)
        self._last = now


class DecodeRun:
    """A model with dummy weights, its attention and caches, and a fixed batch of requests.

    Args:
        folder: Holds config.json.
        num_requests: Most requests of a batch.
    """

    def __init__(self, device: torch.device, folder: Path, clock: Clock, num_requests: int = NUM_REQUESTS) -> None:
        self.device, self.clock, self.num_requests = device, clock, num_requests
        model_config = ModelConfig.from_folder(folder)
        dtype = getattr(torch, model_config.dtype)
        self.model = load_model(folder, model_config, dtype, device, "dummy", max_model_len=1024)
        self.backend = make_backend("auto", self.model.attention_spec(BLOCK_SIZE), device)
        if hasattr(self.backend, "warmup"):
            self.backend.warmup()
            self.backend.warmup(Rope(self.ids(1), self.model.model.cos_sin_cache))
        self.blocks_per_request = (PROMPT_LEN + NUM_STEPS) // BLOCK_SIZE + 2
        shape = self.backend.kv_cache_shape(num_requests * self.blocks_per_request)
        layers = range(model_config.num_hidden_layers)
        self.kv_caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def ids(self, count: int) -> Any:
        """0, 1, ..., count - 1."""
        return torch.arange(count, device=self.device)

    def generate(self, model: Any) -> list[int]:
        """Greedy tokens of all requests."""
        starts = torch.arange(self.num_requests, device=self.device)[:, None]
        prompt_RT = (starts * 997 + self.ids(PROMPT_LEN) * 31 + 7) % 30000
        hidden_TE = self._forward(model, prompt_RT.flatten(), PROMPT_LEN, PROMPT_LEN)
        token_R = self._next(hidden_TE[PROMPT_LEN - 1 :: PROMPT_LEN])
        self.clock.lap("first_token_s")
        tokens = [token_R]
        for step in range(1, NUM_STEPS):
            token_R = self._next(self._forward(model, token_R, 1, PROMPT_LEN + step))
            tokens.append(token_R)
            if step == 1:
                self.clock.lap("second_token_s")
        return [int(token) for token_R in tokens for token in token_R]

    def wait(self) -> None:
        """For the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def decode_args(self, num_requests: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Forward context, token ids and positions of a decode step; the context is entered once."""
        return self._batch(self.ids(num_requests) + 5, 1, PROMPT_LEN + NUM_STEPS, num_requests)

    def time_decode(self, model: Any) -> dict[str, float]:
        """Microseconds per forward of one request at a time: on the host alone, and until the device is done."""
        context, ids_T, positions_T = self.decode_args(1)
        host, total = [], []
        with context:
            for _ in range(40):
                self.wait()
                started = time.perf_counter()
                model(ids_T, positions_T)
                host.append(time.perf_counter() - started)
                self.wait()
                total.append(time.perf_counter() - started)
        return {"host": round(sorted(host)[20] * 1e6, 1), "total": round(sorted(total)[20] * 1e6, 1)}

    def time_graph(self, model: Any) -> dict[str, Any]:
        """Capture a decode forward of one request, and compare a replay with a plain call."""
        context, ids_T, positions_T = self.decode_args(1)
        with context:
            expected_TE = model(ids_T, positions_T).clone()
            torch.cuda.synchronize()
            started = time.perf_counter()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out_TE = model(ids_T, positions_T)
            capture_s = time.perf_counter() - started
        out_TE.zero_()
        graph.replay()
        torch.cuda.synchronize()
        same = bool(torch.equal(out_TE, expected_TE))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(100):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return {"capture_s": round(capture_s, 4), "replay_us": round(begin.elapsed_time(end) * 10, 1), "same": same}

    def _next(self, hidden_RE: Any) -> Any:
        return self.model.compute_logits(hidden_RE).argmax(-1)

    def _forward(self, model: Any, ids_T: Any, query_len: int, seq_len: int) -> Any:
        context, ids_T, positions_T = self._batch(ids_T, query_len, seq_len, self.num_requests)
        with context:
            return model(ids_T, positions_T)

    def _batch(self, ids_T: Any, query_len: int, seq_len: int, num_requests: int) -> Any:
        """Forward context, token ids and positions of a step that brings ``query_len`` tokens to each request."""
        blocks = np.arange(self.num_requests * self.blocks_per_request, dtype=np.int32).reshape(self.num_requests, -1)
        blocks = blocks[:num_requests]
        positions = np.tile(np.arange(seq_len - query_len, seq_len), num_requests)
        rows = np.repeat(np.arange(num_requests), query_len)
        slots = blocks[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        starts = np.arange(num_requests + 1, dtype=np.int32) * query_len
        lengths = np.full(num_requests, seq_len, np.int32)

        def on_device(array: Any) -> Any:
            return torch.from_numpy(array.copy()).to(self.device)

        geometry = BatchGeometry(
            num_reqs=num_requests,
            num_tokens=num_requests * query_len,
            max_query_len=query_len,
            max_seq_len=seq_len,
            query_start_loc_cpu=starts,
            seq_lens_cpu=lengths,
            query_start_loc=on_device(starts),
            seq_lens=on_device(lengths),
            block_table_RM=on_device(blocks),
            slot_mapping_T=on_device(slots.astype(np.int64)),
        )
        context = ForwardContext(self.backend, self.backend.build_metadata(geometry), self.kv_caches)
        return set_forward_context(context), ids_T, on_device(positions.astype(np.int64))
