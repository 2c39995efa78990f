"""The engine on a CUDA device: graphs give the eager path's tokens, whatever arrives, leaves or is preempted.

In bf16 a product of another number of rows is rounded otherwise, and one token then changes all that follow. So tokens
are compared up to a request's first difference, and a difference is right only where the eager path's own two best
tokens are within rounding of one another.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.tiny_models import VOCAB_SIZE, tiny_checkpoint
from workers.config import EngineConfig
from workers.engine.engine import Engine
from workers.outputs import TokenChunk
from workers.sampling_params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MAX_SEQS = 12
#: Two best tokens whose log-probabilities are closer than this may change places.
TIE = 0.06


def make_engine(*, mode: str, num_blocks: int = 200, attention: str = "auto", **compilation: Any) -> Engine:
    """A tiny Llama whose largest captured batch is below ``MAX_SEQS``."""
    return Engine(
        EngineConfig.create(
            model=str(tiny_checkpoint("llama")),
            dtype="bfloat16",
            device="cuda",
            max_model_len=64,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=32,
            num_gpu_blocks_override=num_blocks,
            skip_tokenizer_init=True,
            attention_backend=attention,
            artifacts={"store": None},
            compilation_config={
                "piece_format": "fx",
                "cudagraph_mode": mode,
                "cudagraph_capture_sizes": [1, 2, 4, 8],
                "cudagraph_first_sizes": "all",
                **compilation,
            },
        )
    )


class Traffic:
    """Requests that arrive, and some that leave, at steps that a seed decides."""

    def __init__(self, seed: int, num_requests: int, *, logprobs: int | None = 2) -> None:
        rng = random.Random(seed)
        self.arrivals: dict[int, list[tuple[str, list[int], SamplingParams]]] = {}
        self.aborts: dict[int, list[str]] = {}
        for index in range(num_requests):
            step = rng.randrange(40)
            prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
            params = SamplingParams(
                temperature=0.0, max_tokens=rng.randint(1, 33), ignore_eos=True, detokenize=False, logprobs=logprobs
            )
            self.arrivals.setdefault(step, []).append((str(index), prompt, params))
            if rng.random() < 0.15:
                self.aborts.setdefault(step + rng.randint(1, 15), []).append(str(index))

    def run(self, engine: Engine) -> dict[str, list[TokenChunk]]:
        """Chunks of every request."""
        chunks: dict[str, list[TokenChunk]] = {}
        step = 0
        while step <= 60 or engine.has_unfinished:
            for request_id, prompt, params in self.arrivals.get(step, []):
                engine.add_request(request_id, prompt, params)
            engine.abort(self.aborts.get(step, []))
            for chunk in engine.step() if engine.has_unfinished else []:
                chunks.setdefault(chunk.request_id, []).append(chunk)
            step += 1
        return chunks


def tokens_of(chunks: list[TokenChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def assert_equal_up_to_ties(actual: dict[str, list[TokenChunk]], eager: dict[str, list[TokenChunk]]) -> int:
    """Returns the number of tokens that were compared."""
    num_compared = 0
    for request_id in actual.keys() & eager.keys():
        wanted = [position for chunk in eager[request_id] for position in chunk.logprobs or []]
        for index, (got, expected) in enumerate(
            zip(tokens_of(actual[request_id]), tokens_of(eager[request_id]), strict=False)
        ):
            num_compared += 1
            if got != expected:
                best, second = sorted((entry.logprob for entry in wanted[index].values()), reverse=True)[:2]
                assert best - second < TIE, f"request {request_id}, token {index}: {got} instead of {expected}"
                break
    return num_compared


MODES = ["PIECEWISE", "FULL_DECODE_ONLY", "FULL", "FULL_AND_PIECEWISE"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_traffic_with_aborts(mode: str, seed: int) -> None:
    traffic = Traffic(seed, 40)
    eager = traffic.run(make_engine(mode="NONE"))
    engine = make_engine(mode=mode)
    assert assert_equal_up_to_ties(traffic.run(engine), eager) > 250
    assert sum(engine.graph_report().replays.values()) > 0


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE"])
def test_attention_that_plans_from_what_is_on_the_device(mode: str) -> None:
    """The reference backend reads lengths and block tables when it plans a step, before the step runs."""
    traffic = Traffic(4, 40)
    eager = traffic.run(make_engine(mode="NONE"))
    assert assert_equal_up_to_ties(traffic.run(make_engine(mode=mode, attention="sdpa")), eager) > 250


@pytest.mark.parametrize("mode", ["NONE", "FULL_AND_PIECEWISE"])
def test_preempted_requests_go_on(mode: str) -> None:
    """Five blocks for twelve requests of up to four: some are preempted and recomputed."""
    traffic = Traffic(3, 30)
    eager = traffic.run(make_engine(mode="NONE"))
    engine = make_engine(mode=mode, num_blocks=6)
    assert assert_equal_up_to_ties(traffic.run(engine), eager) > 150
    assert engine.stats().scheduler.num_preemptions > 1


@pytest.mark.parametrize("batch", range(1, MAX_SEQS + 1))
def test_every_batch_size_up_to_beyond_the_largest_graph(batch: int) -> None:
    prompts = [[index + 3, 7, 9] for index in range(batch)]

    def run(mode: str) -> dict[str, list[TokenChunk]]:
        engine, chunks = make_engine(mode=mode), dict[str, list[TokenChunk]]()
        for index, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False, logprobs=2)
            engine.add_request(str(index), prompt, params)
        while engine.has_unfinished:
            for chunk in engine.step():
                chunks.setdefault(chunk.request_id, []).append(chunk)
        return chunks

    assert assert_equal_up_to_ties(run("FULL_AND_PIECEWISE"), run("NONE")) >= batch


def test_sampling_inside_the_graph_and_behind_it_give_the_same_tokens() -> None:
    """Greedy requests are sampled in the graph; those that want logprobs behind it, from the same graph's logits."""
    inside, behind = (
        Traffic(5, 30, logprobs=logprobs).run(make_engine(mode="FULL_DECODE_ONLY")) for logprobs in (None, 0)
    )
    assert {name: tokens_of(chunks) for name, chunks in inside.items()} == {
        name: tokens_of(chunks) for name, chunks in behind.items()
    }


def test_steps_follow_one_another_without_waiting_for_the_device() -> None:
    """While a long batch decodes, the host is a step ahead: it never synchronises except for the step before."""
    engine = make_engine(mode="FULL_DECODE_ONLY")
    for index in range(4):
        engine.add_request(str(index), [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True))
    for _ in range(5):
        engine.step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(10):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.runner.pipeline_depth == 2
