"""Reads a tokenizer's files: tokenizer.json, tokenizer_config.json, chat templates.

``tokenizer.json`` is the truth about tokens and special tokens around a text; ``tokenizer_config.json`` adds names
of special tokens and, in older folders, tokens and the chat template. That is how transformers reads a folder too,
but importing transformers costs a second and a half, so it is left to folders without a tokenizer.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from workers.errors import ModelError

#: Files from which transformers can build a tokenizer when there is no tokenizer.json.
_OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model", "spiece.model")


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Attributes:
        backend: Encodes and decodes; adds special tokens as the folder wants it.
        special_tokens: Text of the named ones: ``bos_token``, ``eos_token``, ...
        chat_templates: Source by name; empty if there is none.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read a checkpoint's tokenizer.

    Raises:
        ModelError: There is no tokenizer, or it cannot be read.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; give the folder of a checkpoint.", param="tokenizer")
    if (folder / "tokenizer.json").is_file():
        files = _read_tokenizer_json(folder)
    elif any((folder / name).is_file() for name in _OTHER_FILES):
        files = _read_with_transformers(folder)
    else:
        raise ModelError(
            f"{folder} has no tokenizer (no tokenizer.json); point `tokenizer` at a folder that has one, or set "
            "skip_tokenizer_init to serve token ids only.",
            param="tokenizer",
        )
    # Either would change what was asked for without a word.
    files.backend.no_truncation()
    files.backend.no_padding()
    return files


def _read_tokenizer_json(folder: Path) -> TokenizerFiles:
    path = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ModelError(f"{path} cannot be read: {error}.", param="tokenizer") from error
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config = {**config, **_read_json(folder / "special_tokens_map.json")}
    special_tokens = {
        name: text
        for name, value in config.items()
        if name.endswith("_token") and (text := _token_text(value)) is not None
    }
    _add_missing_tokens(backend, config, special_tokens)
    return TokenizerFiles(backend, special_tokens, _read_chat_templates(folder, config.get("chat_template")))


def _read_with_transformers(folder: Path) -> TokenizerFiles:
    import transformers  # slow, and needed for old folders only

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"The tokenizer in {folder} cannot be read: {error}. Convert it to a tokenizer.json.", param="tokenizer"
        ) from error
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if _token_text(token)}
    return TokenizerFiles(backend, special_tokens, _by_name(tokenizer.chat_template))


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Tokens that tokenizer_config.json has and tokenizer.json has not, or has with other properties."""
    known = backend.get_added_tokens_decoder().values()
    known_properties = {repr(token) for token in known}
    listed = sorted((int(index), token) for index, token in config.get("added_tokens_decoder", {}).items())
    missing = [token for _, fields in listed if repr(token := tokenizers.AddedToken(**fields)) not in known_properties]
    known_texts = {token.content for token in (*known, *missing)}
    named = [text for text in dict.fromkeys(special_tokens.values()) if text not in known_texts]
    backend.add_tokens([*missing, *(tokenizers.AddedToken(text, special=True) for text in named)])


def _read_chat_templates(folder: Path, in_config: Any) -> dict[str, str]:
    """Template files win over the config's entry."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return _by_name(in_config)


def _by_name(chat_template: Any) -> dict[str, str]:
    """A config's ``chat_template``: one template, several by name, or a list of (name, template)."""
    if chat_template is None:
        return {}
    if isinstance(chat_template, str):
        return {"default": chat_template}
    if isinstance(chat_template, Mapping):
        return dict(chat_template)
    entries: Iterable[Mapping[str, str]] = chat_template
    return {entry["name"]: entry["template"] for entry in entries}


def _token_text(value: Any) -> str | None:
    """A special token is written as its text, or as an object with its properties."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.", param="tokenizer") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object.", param="tokenizer")
    return content
