"""What a decode step of a model must read and compute at least.

Knows parameter shapes and the KV cache's layout; knows nothing about time.
"""

from __future__ import annotations

import dataclasses
import math

from workers.engine.engine import Engine
from workers.runner.kv_cache import block_bytes

_EMBEDDINGS = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True, slots=True)
class ModelWork:
    """Per step, and per token of a step.

    Attributes:
        weight_bytes: Every weight that a step reads, once; of an embedding table of its own, nothing.
        matmul_weights: Numbers in weight matrices; each is multiplied once per token.
        kv_bytes: Of one cached token, over all layers.
        attention_flops: Of one query token and one cached token, over all layers.
    """

    weight_bytes: int
    matmul_weights: int
    kv_bytes: float
    attention_flops: int

    @classmethod
    def of(cls, engine: Engine) -> ModelWork:
        """Read off an engine's model."""
        model, config = engine.runner.model, engine.model_config
        specs = [spec for spec in model.parameter_specs if config.tie_word_embeddings or spec.name != _EMBEDDINGS]
        numbers = {spec.name: math.prod(spec.shape) for spec in specs}
        return cls(
            weight_bytes=sum(numbers[spec.name] * spec.dtype.itemsize for spec in specs),
            matmul_weights=sum(numbers[spec.name] for spec in specs if len(spec.shape) > 1),
            kv_bytes=block_bytes(engine.runner.backend, config.num_hidden_layers) / engine.config.block_size,
            attention_flops=4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers,
        )

    def num_bytes(self, batch: int, context: float) -> float:
        """Bytes of a decode step of ``batch`` requests with ``context`` cached tokens each."""
        return self.weight_bytes + batch * context * self.kv_bytes

    def flops(self, batch: int, context: float) -> float:
        """Operations of the same step; a multiplication and an addition are two."""
        return batch * (2.0 * self.matmul_weights + context * self.attention_flops)
