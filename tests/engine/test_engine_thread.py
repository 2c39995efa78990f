"""The engine's thread: commands in, chunks out, and a death that nobody has to guess."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_checkpoint
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.stats import EngineStats
from workers.engine.thread import EngineThread
from workers.errors import EngineDeadError, InvalidRequestError
from workers.graphs import FileHistogramStore, traffic
from workers.outputs import FinishReason, TokenChunk
from workers.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


class Listener:
    """Collects chunks and waits for a request's last one."""

    def __init__(self) -> None:
        self.chunks: list[TokenChunk] = []
        self.last_stats: EngineStats | None = None
        self.deaths: list[BaseException] = []
        self._changed = threading.Condition()

    def on_step(self, chunks: list[TokenChunk], stats: EngineStats) -> None:
        with self._changed:
            self.chunks.extend(chunks)
            self.last_stats = stats
            self._changed.notify_all()

    def on_death(self, error: BaseException) -> None:
        self.deaths.append(error)

    def wait_for_end(self, request_id: str) -> TokenChunk:
        def last() -> TokenChunk | None:
            return next((c for c in self.chunks if c.request_id == request_id and c.finish_reason), None)

        with self._changed:
            assert self._changed.wait_for(lambda: last() is not None, timeout=60)
        chunk = last()
        assert chunk is not None
        return chunk


def make_engine() -> Engine:
    config = EngineConfig(
        model=str(tiny_checkpoint("llama")), dtype="float32", device="cpu", max_model_len=64, max_num_seqs=4,
        skip_tokenizer_init=True,
    )  # fmt: skip
    return Engine(config)


@pytest.fixture
def listener() -> Listener:
    return Listener()


def test_tokens_arrive_and_blocks_return(listener: Listener) -> None:
    thread = EngineThread(make_engine, listener.on_step, listener.on_death)
    thread.wait_ready(60)
    thread.add("a", [5, 6, 7], GREEDY).result(60)
    assert listener.wait_for_end("a").finish_reason is FinishReason.LENGTH
    assert sum(len(chunk.token_ids) for chunk in listener.chunks) == 6
    thread.stop()
    assert listener.last_stats is not None
    scheduler = listener.last_stats.scheduler
    assert scheduler.num_free_blocks == scheduler.num_total_blocks


def test_a_wrong_request_is_refused_and_the_others_go_on(listener: Listener) -> None:
    thread = EngineThread(make_engine, listener.on_step, listener.on_death)
    thread.add("good", [5, 6], GREEDY).result(60)
    with pytest.raises(InvalidRequestError, match="between 0 and 511"):
        thread.add("bad", [99999], GREEDY).result(60)
    assert listener.wait_for_end("good").finish_reason is FinishReason.LENGTH
    thread.stop()


def test_an_abort_ends_a_request_without_a_chunk(listener: Listener) -> None:
    thread = EngineThread(make_engine, listener.on_step, listener.on_death)
    long = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    thread.add("a", [5, 6], long).result(60)
    thread.abort(["a", "unknown"])
    thread.add("b", [5, 6], GREEDY).result(60)
    listener.wait_for_end("b")
    thread.stop()
    assert not any(chunk.request_id == "a" and chunk.finish_reason for chunk in listener.chunks)
    assert listener.last_stats is not None
    assert listener.last_stats.num_aborted == 1


def test_an_engine_that_fails_ends_its_requests_with_an_error(listener: Listener) -> None:
    class Failing(Engine):
        def step(self) -> list[TokenChunk]:
            raise RuntimeError("the device fell off the bus")

    def make() -> Engine:
        engine = make_engine()
        engine.__class__ = Failing
        return engine

    thread = EngineThread(make, listener.on_step, listener.on_death)
    thread.wait_ready(60)
    thread.add("a", [5, 6], GREEDY)
    chunk = listener.wait_for_end("a")
    assert chunk.finish_reason is FinishReason.ERROR
    assert chunk.error == "The engine stopped: RuntimeError: the device fell off the bus"
    with pytest.raises(EngineDeadError, match="fell off the bus"):
        thread.add("b", [5, 6], GREEDY)
    assert [str(error) for error in listener.deaths] == ["the device fell off the bus"]


def test_an_engine_that_cannot_be_built_says_why(listener: Listener) -> None:
    def make() -> Any:
        raise InvalidRequestError("no such model")

    thread = EngineThread(make, listener.on_step, listener.on_death)
    with pytest.raises(InvalidRequestError, match="no such model"):
        thread.wait_ready(60)
    with pytest.raises(EngineDeadError, match="no such model"):
        thread.add("a", [1], GREEDY)


def _learning_engine() -> Engine:
    config = EngineConfig.create(
        model=str(tiny_checkpoint("llama")), dtype="float32", device="cpu", max_model_len=64, max_num_seqs=4,
        skip_tokenizer_init=True, attention_backend="sdpa",
        compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": "auto"},
    )  # fmt: skip
    return Engine(config)


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WARMGRAPH_ARTIFACTS", str(tmp_path))
    return tmp_path


def _batches(artifacts: Path) -> int:
    return sum(FileHistogramStore(path).load().num_batches for path in artifacts.glob("traffic/batches-*.json"))


def test_batch_sizes_are_saved_when_the_thread_stops(listener: Listener, artifacts: Path) -> None:
    thread = EngineThread(_learning_engine, listener.on_step, listener.on_death)
    thread.add("a", [5, 6, 7], GREEDY).result(60)
    listener.wait_for_end("a")
    thread.stop()
    assert _batches(artifacts) == 6  # a prefill and five decodes


def test_an_idle_engine_captures_the_rest_and_saves_batch_sizes(
    listener: Listener, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "SAVE_PERIOD_S", 0.0)
    thread = EngineThread(_learning_engine, listener.on_step, listener.on_death)
    engine = thread.wait_ready(60)
    thread.add("a", [5, 6, 7], GREEDY).result(60)
    listener.wait_for_end("a")
    deadline = time.monotonic() + 30
    while (engine.graph_report().pending or _batches(artifacts) < 6) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.graph_report().pending == 0
    assert _batches(artifacts) == 6
    thread.stop()
    assert _batches(artifacts) == 6
