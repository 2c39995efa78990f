"""The key of a model's bundle: machine, sources, model, and what the compiler was asked for.

Computed from data alone, so a replica can look for its bundle while it still reads weights: no module is built and no
compiler imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from workers.artifacts.key import BundleKey
from workers.compile.environment import environment_factors, source_digests
from workers.compile.passes.standard import standard_passes
from workers.config import CompilationConfig

#: Ops that stay outside of pieces if the caller names none.
ATTENTION_OPS = ("warmgraph::attention",)

#: Inductor options unless the config says otherwise. What pieces take is settled by the plan and by the check of the
#: arguments; asserting it again in each piece would cost the host as much as launching its kernels. From Hopper on,
#: kernels start while those before them drain (:mod:`workers.kernels.overlap`): all of them in standalone pieces;
#: in aoti pieces, whose launcher does not ask for it, those of our own behind Inductor's.
DEFAULT_OPTIONS: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False, "triton.enable_pdl": True}

#: Graph-affecting factors that a piece depends on besides its own key, which covers its code and the signatures of its
#: inputs. Bundles that agree on them may share builds.
PIECE_SECTIONS = ("environment", "sources", "inductor", "inductor_for_sizes")


def bundle_key(
    config: CompilationConfig,
    device: torch.device,
    dims: Mapping[str, int],
    *,
    splitting_ops: Sequence[str] = ATTENTION_OPS,
    graph: Mapping[str, Any] | None = None,
    capture: Mapping[str, Any] | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> BundleKey:
    """The key under which a compiled model is kept.

    Args:
        dims: The dynamic dimension of each argument of ``forward``.
        splitting_ops: Ops that stay outside of pieces.
        graph: What compiled code depends on besides what this layer knows: the model's shape and dtype, say.
        capture: See :class:`BundleKey`.
        runtime: See :class:`BundleKey`.
    """
    factors = {
        "environment": environment_factors(device),
        "sources": source_digests(),
        "dynamic_dims": dict(dims),
        "splitting_ops": list(splitting_ops),
        "passes": standard_passes(config.pass_config, splitting_ops).uuids(),
        "inductor": inductor_options(config),
        "inductor_for_sizes": config.inductor_compile_config_for_sizes,
    }
    return BundleKey({**(graph or {}), **factors}, capture or {}, runtime or {})


def inductor_options(config: CompilationConfig) -> dict[str, Any]:
    """The options that pieces are compiled with."""
    return DEFAULT_OPTIONS | config.inductor_compile_config
