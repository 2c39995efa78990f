"""Turns what a user wrote as ``model`` into the checkpoint folder it means.

A folder, the name of an imported model, or a Hugging Face repo id, tried in this order. Only the last one
uses the network; importing is done by ``warmgraph model import``.
"""

from __future__ import annotations

import re
from pathlib import Path

from workers.checkpoint.cache import imported_models, is_model_name, model_folder
from workers.errors import ModelError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

#: What the engine reads; the rest of a repo (other frameworks' weights, pictures) is not downloaded.
_WANTED = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]
#: Second copies of the weights in Meta's and Mistral's repos, and anything else in a subfolder.
_UNWANTED = ["consolidated*", "*/*"]


def resolve_model(model: str) -> Path:
    """The checkpoint folder (config.json, safetensors, tokenizer) that ``model`` stands for.

    Args:
        model: A folder, the name of an imported model, or a Hugging Face repo id such as ``org/name``.

    Raises:
        ModelError: There is no such model; the message says how to get one.
    """
    path = Path(model).expanduser()
    if model and path.exists():
        return _local_checkpoint(path)
    if is_model_name(model) and (model_folder(model) / "config.json").is_file():
        return model_folder(model)
    if _REPO_ID.fullmatch(model):
        return _download(model)
    names = ", ".join(imported_models()) or "none yet"
    raise ModelError(
        f"There is no model {model!r} here: give a checkpoint folder, a Hugging Face repo id (org/name), or "
        f"the name of an imported model ({names}); `warmgraph model import` imports one.",
        param="model",
    )


def _local_checkpoint(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path.absolute()
    if path.suffix in (".gguf", ".whl"):
        raise ModelError(f"{path} must be imported first: run `warmgraph model import {path}`.", param="model")
    raise ModelError(f"{path} is not a checkpoint folder: it has no config.json.", param="model")


def _download(repo_id: str) -> Path:
    # Imported here because it costs 0.2 s that a local model need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError as error:
        raise ModelError(
            f"Hugging Face repo {repo_id!r} is gated: accept its terms on its page and set HF_TOKEN.",
            param="model",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no folder or Hugging Face repo {repo_id!r}; check its name, or set HF_TOKEN.",
            param="model",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{repo_id!r} is not a folder here and could not be downloaded from Hugging Face "
            f"({_first_line(error)}); check the network or give a local checkpoint folder.",
            param="model",
        ) from error
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"Hugging Face repo {repo_id!r} has no config.json; choose a repo in that format.", param="model"
        )
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
