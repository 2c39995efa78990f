"""The OpenAPI description, which is the user's documentation at /docs.

Bodies are read, checked and written by our own code, so FastAPI does not know their schemas: endpoints refer to them
by name, and they are added here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from cluster.api.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from cluster.api.responses import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    CompletionResponse,
    ErrorResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    StatusResponse,
    VersionResponse,
)

_REF = "#/components/schemas/{model}"

_REQUESTS: tuple[type[pydantic.BaseModel], ...] = (CompletionRequest, ChatCompletionRequest)
_RESPONSES: tuple[type[pydantic.BaseModel], ...] = (
    CompletionResponse,
    ChatCompletionResponse,
    ChatCompletionChunk,
    ModelCard,
    ModelList,
    HealthResponse,
    StatusResponse,
    VersionResponse,
    ErrorResponse,
)

_ERRORS = {
    400: "The request is wrong; the message says what to change.",
    401: "API keys are configured, and the request has none of them.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "Every queue is full, or the key's limit is used up; try again after Retry-After seconds.",
    500: "The server failed; its log has the details under the id in the message.",
    503: "The engine died or no replica is available; try again.",
    504: "The request's deadline (X-Request-Timeout, in seconds) has passed.",
}


def request_body(model: type[GenerationRequest]) -> dict[str, Any]:
    """The ``openapi_extra`` of an endpoint that takes ``model`` as JSON."""
    refused = ", ".join(sorted(model.unsupported))
    return {
        "requestBody": {
            "required": True,
            "content": _content("application/json", model),
            "description": f"null means not given. Refused by name, unless set to ask for nothing: {refused}.",
        }
    }


def responses(
    model: type[pydantic.BaseModel],
    event: type[pydantic.BaseModel] | None = None,
    *,
    errors: tuple[int, ...] = (),
) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of an endpoint that answers with ``model`` or, streaming, with ``event`` after ``event``."""
    success: dict[str, Any] = {"content": _content("application/json", model), "description": "The response."}
    if event is not None:
        success["content"] |= _content("text/event-stream", event)
        success["description"] = "The response or, with stream=true, events `data: {...}` and at last `data: [DONE]`."
    answers: dict[int | str, dict[str, Any]] = {200: success}
    for status in errors:
        answers[status] = {"content": _content("application/json", ErrorResponse), "description": _ERRORS[status]}
    return answers


def describe(title: str, version: str, routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The OpenAPI document of the application."""
    document = get_openapi(
        title=title,
        version=version,
        description="The OpenAI API for the models of this cluster. Unsupported parameters are refused by name.",
        routes=routes,
    )
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own; ours is 400
    _, schemas = models_json_schema(
        [(model, "validation") for model in _REQUESTS] + [(model, "serialization") for model in _RESPONSES],
        ref_template=_REF,
    )
    document["components"] = {"schemas": schemas["$defs"]}
    return document


def _content(media_type: str, model: type[pydantic.BaseModel]) -> dict[str, Any]:
    assert model in (*_REQUESTS, *_RESPONSES), "the document would lack the schema"
    return {media_type: {"schema": {"$ref": _REF.format(model=model.__name__)}}}
