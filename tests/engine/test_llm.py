"""The offline front: its shape is vLLM's, its mistakes are answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.model_fixtures import write_tiny_gguf
from workers import LLM, SamplingParams
from workers.checkpoint.cache import artifacts_root
from workers.checkpoint.convert import convert_gguf
from workers.errors import ConfigError, InvalidRequestError, ModelError, PromptTooLongError
from workers.graphs import FileHistogramStore
from workers.startup.files import read_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    (root / "model").mkdir()
    convert_gguf(write_tiny_gguf(root / "tiny.gguf"), root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), dtype="float32", device="cpu", max_num_seqs=8)


def test_the_start_is_accounted_for(llm: LLM) -> None:
    texts(llm, "hello", SamplingParams(max_tokens=1))
    report = llm.engine.startup_report()
    names = [phase.name for phase in report.phases]
    assert {"imports", "device", "weights", "profile", "KV cache", "compile", "capture", "tokenizer"} <= set(names)
    assert next(phase for phase in report.phases if phase.name == "weights").num_bytes > 1000
    assert all(phase.end_s is not None for phase in report.phases)
    assert report.ready_s is not None
    assert report.first_token_s is not None
    assert report.ready_s < report.first_token_s
    kept = [read_report(path) for path in (artifacts_root() / "startup").iterdir()]
    assert any(other.first_token_s == report.first_token_s for other in kept), "kept with its last state"


def texts(llm: LLM, prompts: Any, params: Any) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]


def test_prompts_as_text_and_as_token_ids_agree(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8)
    ids = llm.get_tokenizer().encode("hello world")
    forms = ["hello world", {"prompt": "hello world"}, {"prompt_token_ids": ids}]
    assert len(set(texts(llm, forms, params))) == 1
    assert texts(llm, "hello world", params) == texts(llm, ["hello world"], params)


def test_n_completions_are_numbered_and_seeded(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.5, seed=11, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate("hello", params, use_tqdm=False)[0] for _ in range(2))
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert [output.token_ids for output in first.outputs] == [output.token_ids for output in second.outputs]
    assert len({tuple(output.token_ids) for output in first.outputs}) == 3


def test_a_seeded_request_does_not_depend_on_its_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.2, seed=5, max_tokens=16, ignore_eos=True)
    (alone,) = texts(llm, ["hello"], params)
    others = [SamplingParams(temperature=1.0, max_tokens=10 + i, ignore_eos=True) for i in range(5)]
    crowd = texts(llm, ["a", "bb", "hello", "ccc", "dd", "e"], [*others[:2], params, *others[2:]])
    assert crowd[2] == alone


def test_logprobs_and_their_sum(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    (output,) = llm.generate(["hello world"], params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert completion.cumulative_logprob is not None
    chosen = [position[token] for position, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert [entry.rank for entry in chosen] == [1] * 5
    assert sum(entry.logprob for entry in chosen) == pytest.approx(completion.cumulative_logprob)
    assert all(len(position) == 3 for position in completion.logprobs)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_stop_strings_cut_the_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    (whole,) = texts(llm, ["hello"], params)
    stop = whole[6:9]
    stopped = llm.generate(
        "hello", SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=[stop]), use_tqdm=False
    )
    completion = stopped[0].outputs[0]
    assert completion.text == whole[: whole.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert llm.engine.stats().scheduler.num_free_blocks == llm.engine.stats().scheduler.num_total_blocks


def test_max_tokens_of_none_goes_to_the_end_of_the_context(llm: LLM) -> None:
    (output,) = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == llm.engine.max_model_len
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ({"prompt_token_ids": []}, {}, InvalidRequestError, "prompt is empty"),
        ({"prompt_token_ids": [1] * 256}, {}, PromptTooLongError, "the context holds 256"),
        ({"prompt_token_ids": [99999]}, {}, InvalidRequestError, "must be integers between 0 and"),
        ({"prompt_token_ids": [-1]}, {}, InvalidRequestError, "must be integers between 0 and"),
        ({"prompt_token_ids": [2**32]}, {}, InvalidRequestError, "must be integers between 0 and"),
        ({"prompt_token_ids": [1.5]}, {}, InvalidRequestError, "must be integers between 0 and"),
        ({"prompt_token_ids": np.array([[1, 2]])}, {}, InvalidRequestError, "must be integers between 0 and"),
        ({"text": "x"}, {}, InvalidRequestError, r"got the keys \['text'\]"),
        ("hello", {"logit_bias": {99999: 1.0}}, InvalidRequestError, "logit_bias holds token id 99999"),
    ],
)
def test_a_wrong_request_is_named_and_leaves_nothing_behind(
    llm: LLM, prompt: Any, params: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        llm.generate(["hello", prompt], SamplingParams(**params), use_tqdm=False)
    assert not llm.engine.has_unfinished
    assert len(texts(llm, ["hello"], SamplingParams(temperature=0.0, max_tokens=2))) == 1


def test_more_prompts_than_fit_a_step_are_answered_in_order(folder: Path, llm: LLM) -> None:
    narrow = LLM(str(folder), dtype="float32", device="cpu", max_num_seqs=2, max_num_batched_tokens=8)
    params = [SamplingParams(temperature=0.0, max_tokens=3, n=1 + index % 2) for index in range(7)]
    prompts = [{"prompt_token_ids": [index + 1] * (1 + 5 * index)} for index in range(7)]
    outputs = narrow.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [prompt["prompt_token_ids"] for prompt in prompts]
    assert [len(output.outputs) for output in outputs] == [1, 2] * 3 + [1]
    assert outputs == llm.generate(prompts, params, use_tqdm=False)


def test_a_wrong_prompt_ends_those_that_have_begun(folder: Path) -> None:
    llm = LLM(str(folder), dtype="float32", device="cpu", max_num_seqs=2)
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        llm.generate(["hello", "you", "there", {"prompt_token_ids": []}], use_tqdm=False)
    assert llm.engine.stats().num_generated_tokens > 0
    assert not llm.engine.has_unfinished
    assert len(texts(llm, ["hello"], SamplingParams(max_tokens=2))) == 1


def test_batch_sizes_are_saved_at_the_end_and_not_after_every_call(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMGRAPH_ARTIFACTS", str(tmp_path))
    compilation = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": "auto"}
    llm = LLM(
        str(folder), dtype="float32", device="cpu", max_model_len=64, max_num_seqs=4, attention_backend="sdpa",
        compilation_config=compilation,
    )  # fmt: skip
    llm.generate("hello", SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert not list(tmp_path.glob("traffic/batches-*.json"))
    del llm
    (saved,) = tmp_path.glob("traffic/batches-*.json")
    assert FileHistogramStore(saved).load().num_batches == 4


def test_options_are_checked(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM(str(folder), max_num_seq=4)
    with pytest.raises(ConfigError, match="exceeds the 256 positions"):
        LLM(str(folder), max_model_len=4096)
    with pytest.raises(ConfigError, match="lower max_model_len"):
        LLM(str(folder), device="cpu", dtype="float32", kv_cache_memory_bytes=1000)
    with pytest.raises(ModelError, match="There is no model 'nonesuch'"):
        LLM("nonesuch")


def test_one_set_of_params_per_prompt(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="got 1 for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()], use_tqdm=False)
