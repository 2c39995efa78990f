"""The FastAPI application: routes, the error handlers, and what they share. The entry of the HTTP layer.

Knows nothing about Ray: models come in through :class:`~cluster.api.client.ModelDirectory`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.admission.admission import Admission
from cluster.api import openapi
from cluster.api.chat import create_chat_completion
from cluster.api.client import ModelClient, ModelDirectory
from cluster.api.completions import create_completion
from cluster.api.context import ApiContext
from cluster.api.errors import to_api_error
from cluster.api.metrics import HttpMetrics
from cluster.api.middleware import RequestMiddleware
from cluster.api.prompts import PromptReader
from cluster.api.protocol import ChatCompletionRequest, CompletionRequest
from cluster.api.responses import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    CompletionResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    ModelStatus,
    ServeState,
    StatusResponse,
    VersionResponse,
)
from cluster.api.settings import ApiSettings
from workers.errors import WarmgraphError

#: Returns the metrics of the whole cluster as text, and its content type.
MetricsExporter = Callable[[], Awaitable[tuple[bytes, str]]]

_GENERATION_ERRORS = (400, 401, 404, 413, 415, 429, 500, 503, 504)


def create_app(
    directory: ModelDirectory,
    metrics: HttpMetrics,
    settings: ApiSettings | None = None,
    export_metrics: MetricsExporter | None = None,
    admission: Admission | None = None,
) -> FastAPI:
    """The application.

    Args:
        directory: The models.
        metrics: Where requests are counted.
        settings: Limits; the defaults if None.
        export_metrics: What GET /metrics answers; by default the registry of ``metrics`` alone.
        admission: Who is let in; by default everybody.
    """
    settings = settings or ApiSettings()
    context = ApiContext(directory, settings, metrics, PromptReader(settings), admission or Admission())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        context.prompts.close()

    app = _Application(title="warmgraph", version=_version(), lifespan=lifespan, redirect_slashes=False)
    app.add_middleware(RequestMiddleware, metrics=metrics, stalled_client_s=settings.stalled_client_s)
    app.add_exception_handler(WarmgraphError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_unknown_url)
    _add_generation_routes(app, context)
    _add_model_routes(app, context)
    _add_operator_routes(app, directory, export_metrics or metrics.export)
    return app


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = openapi.describe(self.title, self.version, self.routes)
        return self.openapi_schema


def _add_generation_routes(app: FastAPI, context: ApiContext) -> None:
    @app.post(
        "/v1/completions",
        tags=["OpenAI"],
        openapi_extra=openapi.request_body(CompletionRequest),
        responses=openapi.responses(CompletionResponse, CompletionResponse, errors=_GENERATION_ERRORS),
    )
    async def completions(request: Request) -> Response:
        """Complete one or several prompts."""
        return await create_completion(context, request)

    @app.post(
        "/v1/chat/completions",
        tags=["OpenAI"],
        openapi_extra=openapi.request_body(ChatCompletionRequest),
        responses=openapi.responses(ChatCompletionResponse, ChatCompletionChunk, errors=_GENERATION_ERRORS),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await create_chat_completion(context, request)


def _add_model_routes(app: FastAPI, context: ApiContext) -> None:
    @app.get("/v1/models", tags=["OpenAI"], responses=openapi.responses(ModelList, errors=(401,)))
    async def models(request: Request) -> Response:
        """List the served models."""
        context.admission.authenticate(request.headers.get("authorization"))
        cards = [_card(client) for client in context.directory.models()]
        return JSONResponse(ModelList(data=cards).model_dump())

    @app.get("/v1/models/{model:path}", tags=["OpenAI"], responses=openapi.responses(ModelCard, errors=(401, 404)))
    async def model(request: Request, model: str) -> Response:
        """Describe one served model."""
        context.admission.authenticate(request.headers.get("authorization"))
        return JSONResponse(_card(context.directory.lookup(model)).model_dump())


def _add_operator_routes(app: FastAPI, directory: ModelDirectory, export_metrics: MetricsExporter) -> None:
    answers = openapi.responses(HealthResponse)
    not_ready = {**answers[200], "description": "A model has no ready replica, or there is no model."}

    @app.get("/health", tags=["operation"], responses={**answers, 503: not_ready})
    async def health() -> Response:
        """Whether every model has a ready replica."""
        ready = {client.name: client.is_ready for client in directory.models()}
        is_ok = bool(ready) and all(ready.values())
        body = HealthResponse(
            status="ok" if is_ok else "unavailable",
            models={name: "ready" if is_ready else "not_ready" for name, is_ready in ready.items()},
        )
        return JSONResponse(body.model_dump(), status_code=200 if is_ok else 503)

    @app.get("/metrics", tags=["operation"], responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        content, content_type = await export_metrics()
        return Response(content, headers={"Content-Type": content_type})

    @app.get("/status", tags=["operation"], responses=openapi.responses(StatusResponse))
    async def status() -> Response:
        """What each replica of each model reports, and what Serve says of those that do not."""
        clients = directory.models()
        models = await asyncio.gather(*(_status(client) for client in clients))
        by_name = {client.name: model for client, model in zip(clients, models, strict=True)}
        return JSONResponse(StatusResponse(models=by_name).model_dump())

    @app.get("/version", tags=["operation"], responses=openapi.responses(VersionResponse))
    async def version() -> Response:
        """The version of warmgraph."""
        return JSONResponse(VersionResponse(version=app.version).model_dump())


async def _status(client: ModelClient) -> ModelStatus:
    deployment, replicas = await asyncio.gather(client.deployment_state(), client.status())
    return ModelStatus(
        is_ready=client.is_ready,
        deployment=None if deployment is None else ServeState(**dataclasses.asdict(deployment)),
        replicas={name: replica.to_dict() for name, replica in replicas.items()},
    )


def _card(client: ModelClient) -> ModelCard:
    return ModelCard(id=client.name, created=client.created, max_model_len=client.max_model_len)


async def _answer_error(_: Request, error: Exception) -> Response:
    return to_api_error(error).response()


async def _answer_unknown_url(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        error.detail = f"Unknown URL {request.method} {request.url.path}; /docs lists those there are."
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        error.detail = f"{request.url.path} does not take {request.method}; use {allowed}."
    return to_api_error(error).response()


def _version() -> str:
    try:
        return importlib.metadata.version("warmgraph")
    except importlib.metadata.PackageNotFoundError:  # running from a source tree
        return "unknown"
