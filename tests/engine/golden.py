"""References from ``transformers`` for golden tests: greedy tokens and likelihoods, computed once per session."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import transformers

#: Text of several kinds and lengths, so that batches are ragged and prefixes shared by two of them.
PROMPTS = (
    "The capital of France is",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "Once upon a time, in a village by the sea,",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Water boils at 100 degrees Celsius. At high altitude, however, the boiling point is lower because",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
    "La tour Eiffel est un monument de",
)
NUM_TOKENS = 64


@functools.cache
def reference(folder: Path) -> transformers.PreTrainedModel:
    """The checkpoint in fp32, as transformers runs it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache
def prompt_ids(folder: Path) -> tuple[tuple[int, ...], ...]:
    """``PROMPTS`` as transformers tokenises them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tuple(tuple(tokenizer(text)["input_ids"]) for text in PROMPTS)


@functools.cache
def greedy_tokens(folder: Path) -> tuple[tuple[int, ...], ...]:
    """``NUM_TOKENS`` greedy tokens for each prompt, alone, end-of-sequence ignored."""
    return tuple(greedy(folder, ids, NUM_TOKENS) for ids in prompt_ids(folder))


def greedy(folder: Path, ids: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """Greedy continuation of one prompt."""
    with torch.inference_mode():
        output = reference(folder).generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(output[0, len(ids) :].tolist())
