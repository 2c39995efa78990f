"""What an engine's start does on threads of its own while it reads weights. Knows what can be begun, and from when."""

from __future__ import annotations

from concurrent.futures import Future

import torch

from workers.artifacts.key import BundleKey
from workers.artifacts.library import ArtifactLibrary
from workers.attention.base import AttentionBackend, Rope
from workers.compile.ahead import get_pieces_ahead
from workers.config import EngineConfig
from workers.kernels import gpu_linear
from workers.model.config import ModelConfig
from workers.startup.account import StartupAccount
from workers.startup.beside import beside

#: The attention op that rotates by itself; compiled pieces call it where the backend names it.
_ROPE_ATTENTION = "warmgraph::rope_attention"


def begin_ahead(
    config: EngineConfig,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    backend: AttentionBackend,
    library: ArtifactLibrary,
    key: BundleKey,
    account: StartupAccount,
) -> list[Future[None]]:
    """Begin with everything that does not need weights; it must have ended before a model is compiled or run.

    Args:
        device: Where the engine runs.
        model_config: The model's shape.
        dtype: Of its weights.
        backend: Its attention.
        library: Where its pieces are looked for.
        key: Of its bundle.
    """
    tasks = []
    compilation = config.compilation_config
    is_compiled = config.compiles_pieces(device.type)
    if is_compiled:
        tasks.append(beside(account, "artifacts", lambda: get_pieces_ahead(compilation, device, library, key, account)))

    def warm_up_attention() -> None:
        rotates = is_compiled and _ROPE_ATTENTION in backend.splitting_ops
        # The current device is a thread's own.
        with torch.cuda.device(device):
            backend.warmup(_rope_of(model_config) if rotates else None)

    def warm_up_linear() -> None:
        with torch.cuda.device(device):
            gpu_linear.prepare(dtype, device)

    if device.type == "cuda":
        tasks.append(beside(account, "attention kernels", warm_up_attention))
        tasks.append(beside(account, "linear kernels", warm_up_linear))
    return tasks


def _rope_of(config: ModelConfig) -> Rope:
    """What compiled pieces hand to the attention op, as far as kernels depend on it."""
    nothing = torch.empty(0)
    norm_D = nothing if config.qk_norm else None
    return Rope(nothing, nothing, norm_D, norm_D, config.rms_norm_eps)
