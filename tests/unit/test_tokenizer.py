"""Ids equal transformers' for the same folder, and what a folder lacks is said in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tokenizers import Tokenizer as Backend

from tests.tokenizer_cases import (
    CHATML,
    SAMPLES,
    byte_level_json,
    sentencepiece_json,
    texts,
    wordpiece_json,
    write_folder,
)
from workers.errors import InvalidRequestError, ModelError
from workers.tokenizer.tokenizer import Tokenizer

#: Folder name -> (tokenizer.json, tokenizer_config.json).
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (byte_level_json(add_bos=True), {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}),
    # tokenizer.json decides about BOS, whatever the config says; transformers does the same.
    "llama3-says-no": (
        byte_level_json(add_bos=True),
        {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "add_bos_token": False, "add_eos_token": True},
    ),
    "qwen": (
        byte_level_json(qwen_like=True),
        {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False, "pad_token": "<|eos|>"},
    ),
    "llama2": (sentencepiece_json(), {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>"}),
    "extra-tokens": (
        byte_level_json(),
        {
            "eos_token": "<|new_eos|>",
            "added_tokens_decoder": {
                "404": {"content": "<|im_end|>", "special": True, "lstrip": True, "normalized": False},
                "500": {"content": "<tool_call>", "special": False, "normalized": False},
            },
        },
    ),
    "wordpiece": (wordpiece_json(), {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write_folder(root / name, text, **config) for name, (text, config) in FOLDERS.items()}


def reference(folder: Path) -> Any:
    import transformers

    auto: Any = transformers.AutoTokenizer
    return auto.from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_equal_transformers(folders: dict[str, Path], name: str) -> None:
    expected, ours = reference(folders[name]), Tokenizer.from_folder(folders[name])
    assert ours.vocab_size == len(expected)
    assert (ours.eos_token, ours.eos_token_id) == (expected.eos_token, expected.eos_token_id)
    assert (ours.bos_token, ours.bos_token_id) == (expected.bos_token, expected.bos_token_id)
    assert ours.all_special_ids >= {i for i in (ours.bos_token_id, ours.eos_token_id) if i is not None}
    for text in (*SAMPLES, "a <|im_end|> b<tool_call>c<|new_eos|>", "<s>x</s>", "say hello"):
        for add_special_tokens in (True, False):
            ids = ours.encode(text, add_special_tokens)
            assert ids == expected.encode(text, add_special_tokens=add_special_tokens)
            for skip in (True, False):
                assert ours.decode(ids, skip) == expected.decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )


def test_qwen_class_reads_the_same_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    """A folder that names its own class is rebuilt from its vocabulary by transformers; the ids stay the same."""
    text, config = FOLDERS["qwen"]
    folder = write_folder(tmp_path / "qwen2", text, **{**config, "tokenizer_class": "Qwen2Tokenizer"})
    expected, ours = reference(folder), Tokenizer.from_folder(folder)
    for sample in ("Hello, world!", "naïve café 你好世界 😀", "def f(x):\n    return x**2"):
        assert ours.encode(sample) == expected.encode(sample)


@hypothesis.given(texts())
@hypothesis.settings(max_examples=100, deadline=None)
def test_round_trip(text: str) -> None:
    tokenizer = Tokenizer(Backend.from_str(byte_level_json(add_bos=True)))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    pieces = [tokenizer.convert_id(token_id) for token_id in ids[1:]]
    if not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces):
        assert "".join(pieces) == text


def test_text_of_single_tokens() -> None:
    byte_level = Tokenizer(Backend.from_str(byte_level_json()))
    hello = byte_level.encode(" a\n", add_special_tokens=False)
    assert [byte_level.convert_id(token_id) for token_id in hello] == [" a", "\n"]
    assert byte_level.convert_id(byte_level.encode("<|im_end|>")[0]) == "<|im_end|>"
    assert byte_level.convert_id(10**6) == ""
    sentencepiece = Tokenizer(Backend.from_str(sentencepiece_json()))
    world = sentencepiece.backend.token_to_id("▁world")
    assert world is not None
    assert sentencepiece.convert_id(world) == " world"
    assert sentencepiece.convert_id(3 + 0xE4) == "\N{REPLACEMENT CHARACTER}"


def test_truncation_and_padding_of_the_file_are_not_obeyed(tmp_path: Path) -> None:
    backend = Backend.from_str(byte_level_json())
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, str(backend.to_str())))
    assert len(tokenizer.encode("a" * 100, add_special_tokens=False)) > 8
    assert len(tokenizer.encode("a", add_special_tokens=False)) == 1


def test_encoding_from_many_threads() -> None:
    tokenizer = Tokenizer(Backend.from_str(byte_level_json(add_bos=True)))
    inputs = [sample * repeat for sample in SAMPLES for repeat in (1, 5, 20)] * 4
    expected = [(tokenizer.encode(text), tokenizer.decode(tokenizer.encode(text))) for text in inputs]
    with ThreadPoolExecutor(8) as threads:
        results = list(
            threads.map(lambda text: (tokenizer.encode(text), tokenizer.decode(tokenizer.encode(text))), inputs)
        )
    assert results == expected


def test_half_a_surrogate_pair_is_the_callers_mistake() -> None:
    tokenizer = Tokenizer(Backend.from_str(byte_level_json()))
    with pytest.raises(InvalidRequestError, match="half of a surrogate pair"):
        tokenizer.encode(json.loads('"\\ud83d"'))


def test_without_tokenizer_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer.json.*skip_tokenizer_init"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ModelError, match="not a folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "[1]"), ("tokenizer_config.json", "{")]
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    folder = write_folder(tmp_path, byte_level_json())
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=name):
        Tokenizer.from_folder(folder)


def test_older_folders_are_read_through_transformers(tmp_path: Path) -> None:
    """vocab.json and merges.txt alone, as GPT-2 and the first Qwen2 were published."""
    model = json.loads(byte_level_json(qwen_like=True))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, expected = Tokenizer.from_folder(tmp_path), reference(tmp_path)
    assert tokenizer.eos_token_id == expected.eos_token_id
    for sample in SAMPLES:
        assert tokenizer.encode(sample) == expected.encode(sample)
    assert "assistant" in tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_transformers_is_not_imported(folders: dict[str, Path]) -> None:
    script = (
        "import sys; from workers.tokenizer.tokenizer import Tokenizer; "
        f"Tokenizer.from_folder({str(folders['llama3'])!r}).encode('a'); "
        "assert not {'transformers', 'torch'} & set(sys.modules), 'slow import'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
