"""Which tensor of a Hugging Face checkpoint fills which rows of which parameter.

Knows how the decoder fuses projections and what older checkpoints carry beside weights. Moves no data.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from workers.model.config import ModelConfig

#: Stored by old versions of transformers; recomputed here from the config.
IGNORABLE_SUFFIXES = (".rotary_emb.inv_freq",)

#: Stored by some checkpoints although tied: must then equal the embeddings.
TIED_HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True, slots=True)
class Destination:
    """Rows of a parameter that one checkpoint tensor fills.

    Attributes:
        parameter: Name of the parameter.
        start: First row.
        shape: Of the checkpoint tensor; ``shape[0]`` rows are filled.
    """

    parameter: str
    start: int
    shape: tuple[int, ...]


def checkpoint_layout(model: nn.Module, config: ModelConfig) -> dict[str, Destination]:
    """Destination of every tensor that the checkpoint must hold, by the checkpoint's name.

    Every row of every parameter is covered exactly once.
    """
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    fused = {
        "qkv_proj": (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)),
        "gate_up_proj": (("gate_proj", config.intermediate_size), ("up_proj", config.intermediate_size)),
    }
    layout: dict[str, Destination] = {}
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        start = 0
        for part, num_rows in fused.get(module, ((module, parameter.shape[0]),)):
            shape = (num_rows, *parameter.shape[1:])
            layout[name.replace(module, part)] = Destination(name, start, shape)
            start += num_rows
        assert start == parameter.shape[0], f"{name}: {start} rows planned of {parameter.shape[0]}"
    return layout
