"""From the bytes of a body to a request, or to one sentence that says what to change.

Reports the first problem only, with the path of the field at fault in ``param``. Knows JSON and pydantic, nothing
about models or tokens.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar

import pydantic

from cluster.api.errors import (
    MalformedBodyError,
    MissingParameterError,
    UnknownParameterError,
    UnsupportedParameterError,
)
from cluster.api.protocol import GenerationRequest
from workers.errors import InvalidRequestError

RequestT = TypeVar("RequestT", bound=GenerationRequest)

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
#: An escaped UTF-16 surrogate: JSON allows a lone one, UTF-8 and tokenizers do not.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def parse_request(request_type: type[RequestT], body: bytes) -> RequestT:
    """Validate a request body.

    Raises:
        InvalidRequestError: One sentence; the subclass says which kind of mistake.
    """
    data = _without_foreign_parameters(request_type, decode_json_object(body))
    try:
        return request_type.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(error.errors(include_url=False)[0], request_type) from None


def decode_json_object(body: bytes) -> dict[str, Any]:
    """Decode a body that must be one JSON object in UTF-8.

    Raises:
        MalformedBodyError: With the position of the mistake.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedBodyError(f"The body is not valid UTF-8 (at byte {error.start}); send UTF-8.") from None
    if not text.strip():
        raise MalformedBodyError("The body is empty; send a JSON object.")
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno} (character {error.pos})"
        raise MalformedBodyError(f"The body is not valid JSON: {error.msg} at {where}.") from None
    except RecursionError:
        raise MalformedBodyError("The body is nested too deeply.") from None
    except ValueError as error:
        raise MalformedBodyError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise MalformedBodyError(f"The body must be a JSON object, got {_show(data)}.")
    if _SURROGATE_ESCAPE.search(text):
        _refuse_lone_surrogates(data)
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_lone_surrogates(data: dict[str, Any]) -> None:
    pending: list[Any] = [data]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, str) and not _is_encodable(item):
            raise MalformedBodyError("The body has a string with half of a surrogate pair (\\ud800 to \\udfff).")


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _without_foreign_parameters(request_type: type[GenerationRequest], data: dict[str, Any]) -> dict[str, Any]:
    """The parameters that do something; the others are refused, or ask for nothing."""
    fields = request_type.model_fields
    for name, value in data.items():
        if name in fields or value is None:
            continue
        if name not in request_type.unsupported:
            raise _unknown(name, name, fields)
        neutral = request_type.unsupported[name]
        if not any(type(value) is type(item) and value == item for item in neutral):
            other = f" or set it to {json.dumps(neutral[0])}" if neutral else ""
            raise UnsupportedParameterError(f"{name} is not supported; remove it{other}.", param=name)
    return {name: value for name, value in data.items() if name in fields}


def _unknown(path: str, name: str, valid: Iterable[str]) -> UnknownParameterError:
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "remove it; /docs lists the valid ones."
    return UnknownParameterError(f"{_clip(path)} is not a known parameter; {hint}", param=_clip(path))


def _explain(item: Any, request_type: type[GenerationRequest]) -> InvalidRequestError:
    """Turn pydantic's report of one mistake into a sentence."""
    kind, path = item["type"], _path(item["loc"])
    if kind == "extra_forbidden":
        return _unknown(path, str(item["loc"][-1]), _fields_at(request_type, item["loc"]))
    if kind == "missing":
        return MissingParameterError(f"{path} is required.", param=path)
    if kind == "too_short":
        return InvalidRequestError(f"{path} must not be empty.", param=path)
    if kind == "literal_error":
        return InvalidRequestError(f"{path} must be {item['ctx']['expected']}, got {_show(item['input'])}.", param=path)
    if kind == "value_error":
        return _from_checker(path, str(item["ctx"]["error"]))
    expected = _EXPECTED.get(kind)
    if expected is None:
        return InvalidRequestError(f"{path}: {item['msg']}.", param=path)
    return InvalidRequestError(f"{path} must be {expected}, got {_show(item['input'])}.", param=path)


def _from_checker(path: str, message: str) -> InvalidRequestError:
    """A sentence from one of our own checkers: a predicate of the field, or of the whole request."""
    if not path:
        return InvalidRequestError(f"{message}.", param=message.split()[0])
    separator = "" if message.startswith("[") else " "
    return InvalidRequestError(f"{path}{separator}{message}.", param=path)


def _fields_at(model: type[pydantic.BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """Names that are valid where the unknown last part of ``loc`` stands."""
    current: Any = model
    for part in loc[:-1]:
        if isinstance(part, str):
            current = _nested_model(current.model_fields[part].annotation)
    return list(current.model_fields)


def _nested_model(annotation: Any) -> Any:
    """The pydantic model inside ``X``, ``X | None`` or ``list[X]``."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    return next((found for arg in getattr(annotation, "__args__", ()) if (found := _nested_model(arg))), None)


def _path(loc: tuple[str | int, ...]) -> str:
    """``messages[0].content`` for ``("messages", 0, "content")``."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _show(value: Any) -> str:
    """A value as a message may quote it."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return _clip(json.dumps(value))


def _clip(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
