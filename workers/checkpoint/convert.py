"""Converts a GGUF file into an ordinary Hugging Face checkpoint folder with bfloat16 weights.

One tensor is read, dequantised and written at a time, in pieces of a few megabytes. Where the file comes from
and where the folder is kept is somebody else's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers.checkpoint.gguf_config import find_architecture, hf_config, hf_generation_config
from workers.checkpoint.gguf_file import GGUFFile
from workers.checkpoint.gguf_tensors import plan_tensors
from workers.checkpoint.gguf_tokenizer import build_tokenizer, hf_tokenizer_config
from workers.checkpoint.safetensors_writer import SafetensorsWriter

#: Called with (bytes of the GGUF file's tensors converted so far, bytes in all).
Progress = Callable[[int, int], None]


def convert_gguf(source: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write the checkpoint of a GGUF file into an existing, empty folder.

    Args:
        source: The GGUF file.
        folder: Receives config.json, generation_config.json, tokenizer.json, tokenizer_config.json and
            model.safetensors.
        progress: Told after each tensor.

    Raises:
        ModelError: The file is broken or holds something that is not supported.
    """
    with GGUFFile(source) as file:
        config = hf_config(file)
        plans = plan_tensors(file, find_architecture(file), config)
        build_tokenizer(file).save(str(folder / "tokenizer.json"), pretty=False)
        _write_json(folder / "tokenizer_config.json", hf_tokenizer_config(file, config["max_position_embeddings"]))
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", hf_generation_config(file))
        num_bytes = sum(plan.source.num_bytes for plan in plans)
        num_done = 0
        with (folder / "model.safetensors").open("wb") as weights:
            writer = SafetensorsWriter(weights, {plan.name: plan.source.shape for plan in plans})
            for plan in plans:
                writer.write(plan.name, file.rows(plan.source, plan.order))
                num_done += plan.source.num_bytes
                if progress is not None:
                    progress(num_done, num_bytes)
            writer.close()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
