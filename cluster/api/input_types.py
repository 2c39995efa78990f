"""Types of request fields that JSON writes in several ways, each checked by one function with a plain sentence.

pydantic's unions report one error per alternative, and walk a list of 100,000 token ids once for each. The
checkers raise ValueError with a predicate ("must be ..."); :mod:`cluster.api.validation` puts the field's name
before it. They judge shape and type, not range: :class:`~workers.sampling_params.SamplingParams` knows ranges.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeAlias

import pydantic

_TOKEN_ID = re.compile(r"[0-9]{1,10}")


def check_prompt(value: Any) -> Any:
    """A string, a list of strings, a list of token ids, or a list of lists of token ids; nothing empty."""
    if isinstance(value, str):
        if not value:
            raise ValueError("must not be empty")
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not value:
        raise ValueError("must not be empty")
    if all(type(item) is int for item in value):
        return value
    if all(isinstance(item, str) for item in value) or all(_is_token_list(item) for item in value):
        for position, item in enumerate(value):
            if not item:
                raise ValueError(f"[{position}] must not be empty")
        return value
    raise ValueError("must hold strings only, token ids only, or lists of token ids only")


def check_stop(value: Any) -> Any:
    """A string or a list of strings."""
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError("must be a string or a list of strings")


def check_logit_bias(value: Any) -> dict[int, float]:
    """An object from token ids, as JSON writes keys (``"42"``), to numbers."""
    if not isinstance(value, dict):
        raise ValueError('must be an object from token ids to numbers, such as {"42": -100}')
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not _TOKEN_ID.fullmatch(key):
            raise ValueError(f"must have token ids as keys, got {key!r}")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise ValueError(f"must map {key!r} to a number")
        biases[int(key)] = float(bias)
    return biases


def check_content(value: Any) -> str | None:
    """A string, or a list of text parts, which are joined by newlines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of text parts")
    texts: list[str] = []
    for position, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError(f'[{position}] must be an object such as {{"type": "text", "text": "..."}}')
        if part["type"] != "text":
            raise ValueError(f"[{position}] is a part of type {part['type']!r}, but this model reads text only")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f'[{position}] must have the keys "type" and "text" only, and "text" must be a string')
        texts.append(part["text"])
    return "\n".join(texts)


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


class TextPart(pydantic.BaseModel):
    """A text part of a message; the schema's picture of what :func:`check_content` reads."""

    type: str = "text"
    text: str


Prompt: TypeAlias = Annotated[
    str | list[str] | list[int] | list[list[int]],
    pydantic.PlainValidator(check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Stop: TypeAlias = Annotated[
    str | list[str], pydantic.PlainValidator(check_stop, json_schema_input_type=str | list[str])
]
LogitBias: TypeAlias = Annotated[
    dict[int, float], pydantic.PlainValidator(check_logit_bias, json_schema_input_type=dict[str, float])
]
Content: TypeAlias = Annotated[
    str | None, pydantic.PlainValidator(check_content, json_schema_input_type=str | list[TextPart] | None)
]
