"""Where imported models and compiled artifacts live on this machine.

The only place that reads the environment for it. Knows names and folders, not what is in them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from workers.errors import ModelError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def cache_root() -> Path:
    """``$WARMGRAPH_CACHE``, ``$XDG_CACHE_HOME/warmgraph`` or ``~/.cache/warmgraph``; may not exist yet."""
    if explicit := os.environ.get("WARMGRAPH_CACHE"):
        return Path(explicit).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "warmgraph"
    return Path.home() / ".cache" / "warmgraph"


def models_root() -> Path:
    """The folder with one checkpoint folder per imported model; may not exist yet."""
    return cache_root() / "models"


def artifacts_root() -> Path:
    """``$WARMGRAPH_ARTIFACTS``, or a folder of :func:`cache_root`: artifacts, keys and notes of this user."""
    if explicit := os.environ.get("WARMGRAPH_ARTIFACTS"):
        return Path(explicit).expanduser().absolute()
    return cache_root() / "artifacts"


def is_model_name(text: str) -> bool:
    """Whether this can be the name of an imported model: letters, digits, ``.``, ``_`` and ``-``."""
    return _NAME.fullmatch(text) is not None


def model_folder(name: str) -> Path:
    """Where the model of this name is or would be.

    Raises:
        ModelError: The name could not be a folder's name.
    """
    if not is_model_name(name):
        raise ModelError(
            f"{name!r} cannot name a model: use letters, digits, '.', '_' and '-', and start with a letter.",
            param="name",
        )
    return models_root() / name


def imported_models() -> list[str]:
    """Names of the models that are there, sorted. Imports in progress (hidden folders) are left out."""
    root = models_root()
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if is_model_name(path.name) and (path / "config.json").is_file())
