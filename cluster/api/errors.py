"""The one mapping from errors to HTTP: status, headers and the OpenAI error body.

Knows the error tree of :mod:`workers.errors`, and adds to it the errors that only HTTP has. A user's error is
answered with its own sentence; an unexpected one with an opaque id under which it is logged.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cluster.admission.errors import AuthenticationError, DeadlineExceededError
from workers.errors import (
    EngineDeadError,
    InvalidRequestError,
    PoisonedRequestError,
    PromptTooLongError,
    QueueFullError,
    UnknownModelError,
    UserError,
    WarmgraphError,
)

logger = logging.getLogger(__name__)


class UnsupportedParameterError(InvalidRequestError):
    """A parameter of the OpenAI API that is not supported here."""


class UnknownParameterError(InvalidRequestError):
    """A parameter that nobody knows."""


class MissingParameterError(InvalidRequestError):
    """A required parameter is missing."""


class MalformedBodyError(InvalidRequestError):
    """The body is not a JSON object in UTF-8."""


class BodyTooLargeError(UserError):
    """The body exceeds the limit (HTTP 413)."""


class UnsupportedMediaTypeError(UserError):
    """The body is not sent as JSON (HTTP 415)."""


class GenerationFailedError(WarmgraphError):
    """The engine gave up on one request (HTTP 500); its sentence is passed on."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Rule:
    status: int
    type: str
    code: str


_INVALID = "invalid_request_error"
_SERVER = "server_error"

#: The nearest class in an error's line of ancestors decides.
_RULES: dict[type[BaseException], _Rule] = {
    UserError: _Rule(400, _INVALID, "invalid_value"),
    PromptTooLongError: _Rule(400, _INVALID, "context_length_exceeded"),
    UnsupportedParameterError: _Rule(400, _INVALID, "unsupported_parameter"),
    UnknownParameterError: _Rule(400, _INVALID, "unknown_parameter"),
    MissingParameterError: _Rule(400, _INVALID, "missing_required_parameter"),
    MalformedBodyError: _Rule(400, _INVALID, "invalid_json"),
    AuthenticationError: _Rule(401, _INVALID, "invalid_api_key"),
    UnknownModelError: _Rule(404, _INVALID, "model_not_found"),
    BodyTooLargeError: _Rule(413, _INVALID, "request_too_large"),
    UnsupportedMediaTypeError: _Rule(415, _INVALID, "unsupported_media_type"),
    QueueFullError: _Rule(429, "rate_limit_error", "rate_limit_exceeded"),
    GenerationFailedError: _Rule(500, _SERVER, "generation_failed"),
    PoisonedRequestError: _Rule(500, _SERVER, "request_kills_replicas"),
    EngineDeadError: _Rule(503, _SERVER, "engine_dead"),
    DeadlineExceededError: _Rule(504, "timeout_error", "deadline_exceeded"),
}

_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}


@dataclasses.dataclass(frozen=True, slots=True)
class ApiError:
    """An error as the client sees it."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The OpenAI error body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer to send if no response has started."""
        return JSONResponse(self.body(), status_code=self.status, headers=dict(self.headers))


def to_api_error(error: Exception) -> ApiError:
    """Describe ``error`` to the client; what is not on the list is logged and described by an id alone."""
    if isinstance(error, HTTPException):
        code = _HTTP_CODES.get(error.status_code, "http_error")
        return ApiError(error.status_code, error.detail, _INVALID, code, headers=dict(error.headers or {}))
    rule = next((_RULES[cls] for cls in type(error).__mro__ if cls in _RULES), None)
    if rule is None:
        return _unexpected(error)
    headers = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, PoisonedRequestError | DeadlineExceededError):
        headers["X-Should-Retry"] = "false"  # OpenAI's client would send it again
    if isinstance(error, BodyTooLargeError):
        headers["Connection"] = "close"  # the rest of the body is not read
    param = getattr(error, "param", None)
    if param is None and isinstance(error, UnknownModelError):
        param = "model"
    return ApiError(rule.status, str(error), rule.type, rule.code, param, headers)


def _unexpected(error: Exception) -> ApiError:
    error_id = uuid.uuid4().hex
    logger.error("unexpected error %s", error_id, exc_info=error)
    return ApiError(
        500, f"Internal error; the server's log has the details under {error_id}.", _SERVER, "internal_error"
    )
