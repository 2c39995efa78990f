"""What an engine needs of its device's memory besides weights and KV cache, measured once and kept.

The first engine of a configuration finds out by a profiling run and by capturing; the numbers travel with its
artifacts, and an engine that finds as much free memory as they were made with uses them as they are. Arithmetic and
plain data: knows no torch, and not how either is measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from typing import Self

from workers.artifacts.errors import ArtifactError
from workers.artifacts.key import BundleKey
from workers.artifacts.library import Addition, ArtifactLibrary
from workers.artifacts.manifest import Kind
from workers.config import EngineConfig
from workers.errors import ConfigError

logger = logging.getLogger(__name__)

_VERSION = 1
#: Set aside for captured graphs before anybody has measured them: what 90 graphs of a 1B or 8B Llama take, doubled.
UNMEASURED_GRAPH_BYTES = 512 << 20
#: What a process takes of a device outside PyTorch's allocator: the driver's context, libraries, loaded kernels.
#: A generous guess, since beside other processes it cannot be measured.
PROCESS_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Measured needs, in bytes.

    Attributes:
        peak_activations: Of the largest step, above the weights.
        graph_bytes: Held by captured graphs.
        free_bytes: Free on the device, weights loaded, when this was measured.
    """

    peak_activations: int
    graph_bytes: int
    free_bytes: int

    def to_bytes(self) -> bytes:
        """Versioned JSON."""
        return json.dumps({"version": _VERSION, **dataclasses.asdict(self)}, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self | None:
        """What :meth:`to_bytes` wrote; None for anything else, which is measured again."""
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            fields = json.loads(data)
        except ValueError:
            return None
        if not isinstance(fields, dict) or fields.pop("version", None) != _VERSION or fields.keys() != names:
            return None
        if not all(type(value) is int and 0 <= value < 1 << 60 for value in fields.values()):
            return None
        return cls(**fields)

    def applies(self, free_bytes: int) -> bool:
        """Whether the device has at least as much free memory as when this was measured."""
        return free_bytes >= self.free_bytes


def kv_cache_bytes(utilization: float, total: int, free: int, own: int, plan: MemoryPlan) -> int:
    """What is left for the KV cache once everything else that the engine keeps on the device is taken from its share.

    A share is the engine's alone, whoever else is on the device: two engines with 0.45 each fit beside one another, in
    whatever order they start. The meaning is vLLM's.

    Args:
        utilization: Share of the device's memory that the engine may fill.
        total: The device's memory, in bytes.
        free: Of it, with the weights loaded; memory that is cached for reuse counts as free.
        own: What the engine has allocated, in bytes: its weights. What its process takes besides is estimated.

    Raises:
        ConfigError: The share leaves nothing, or others left less of the device than the share; says what to change.
    """
    spoken_for = plan.peak_activations + plan.graph_bytes
    share = int(total * utilization) - own - PROCESS_BYTES - spoken_for
    step = f"the largest step {plan.peak_activations / 2**30:.1f} and captured graphs {plan.graph_bytes / 2**30:.1f}"
    if share <= 0:
        raise ConfigError(
            f"gpu_memory_utilization={utilization} leaves no memory for the KV cache: of {total / 2**30:.1f} GiB, "
            f"weights and the process take {(own + PROCESS_BYTES) / 2**30:.1f}, {step}; raise it, or lower "
            "max_num_batched_tokens or max_cudagraph_capture_size.",
            param="gpu_memory_utilization",
        )
    if share > free - spoken_for:
        raise ConfigError(
            f"gpu_memory_utilization={utilization} needs {(share + spoken_for) / 2**30:.1f} GiB beside the weights, "
            f"and only {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free on the device ({step}); lower it, or "
            "free the device.",
            param="gpu_memory_utilization",
        )
    return share


class MemoryPlanShelf:
    """Where the plans of one bundle key lie: beside its pieces, one for each set of settings that it depends on."""

    def __init__(self, library: ArtifactLibrary, key: BundleKey, config: EngineConfig) -> None:
        self._library = library
        self._key = key
        compilation = config.compilation_config
        settings = [
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.enforce_eager,
            compilation.model_dump(mode="json", include={"mode", "cudagraph_mode", "max_cudagraph_capture_size"}),
        ]
        self._name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def load(self) -> MemoryPlan | None:
        """The stored plan, if there is one to be trusted."""
        bundle = self._library.peek(self._key)
        entry = bundle.first(Kind.MEMORY_PLAN, self._name) if bundle is not None else None
        if bundle is None or entry is None:
            return None
        try:
            return MemoryPlan.from_bytes(self._library.read(bundle, entry))
        except ArtifactError as error:
            logger.warning("the stored memory plan is not used: %s", error)
            return None

    def save(self, plan: MemoryPlan) -> None:
        """Publish a plan beside what the bundle has; without a bundle there is nothing to be beside."""
        bundle = self._library.peek(self._key)
        if bundle is not None:
            self._library.publish(self._key, [Addition(Kind.MEMORY_PLAN, self._name, plan.to_bytes())], bundle)
