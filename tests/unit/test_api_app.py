"""The application around the generation endpoints: routes, health, metrics, ids, documentation, imports."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry

from cluster.api.app import create_app
from cluster.api.metrics import HttpMetrics
from cluster.messages import DeploymentState
from tests.api_fakes import FakeClient, FakeDirectory, answer, error_of, make_api, replica_status
from workers.errors import QueueFullError


def test_importing_the_http_layer_imports_no_torch_and_no_ray() -> None:
    code = "import cluster.api.app, sys; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


async def test_models_are_listed_and_described() -> None:
    api = make_api()
    card = {"id": "fake", "object": "model", "created": 1_700_000_000, "owned_by": "warmgraph", "max_model_len": 1024}
    assert (await api.request("GET", "/v1/models")).json() == {"object": "list", "data": [card]}
    assert (await api.request("GET", "/v1/models/fake")).json() == card


async def test_a_model_name_may_have_slashes() -> None:
    api = make_api(name="org/model")
    assert (await api.request("GET", "/v1/models/org/model")).json()["id"] == "org/model"


async def test_an_unknown_model_is_404() -> None:
    response = await make_api().request("GET", "/v1/models/gpt-4")
    assert response.status_code == 404
    assert error_of(response) == {
        "message": "No model 'gpt-4' here; served: fake.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(("ready", "status"), [([True, True], 200), ([True, False], 503), ([False], 503), ([], 503)])
async def test_health_needs_every_model_ready(ready: list[bool], status: int) -> None:
    clients = [FakeClient(name=f"m{i}", is_ready=is_ready) for i, is_ready in enumerate(ready)]
    api = make_api()
    api.app = create_app(FakeDirectory(clients), HttpMetrics(CollectorRegistry()))
    response = await api.request("GET", "/health")
    assert response.status_code == status
    assert response.json() == {
        "status": "ok" if status == 200 else "unavailable",
        "models": {f"m{i}": "ready" if is_ready else "not_ready" for i, is_ready in enumerate(ready)},
    }


async def test_status_shows_every_replica_of_every_model() -> None:
    status = replica_status()
    deployment = DeploymentState("DEPLOY_FAILED", "The constructor failed.", {"STARTING": 1})
    clients = [
        FakeClient(name="busy", replicas={"a": status, "b": status}),
        FakeClient(name="down", is_ready=False, deployment=deployment),
    ]
    api = make_api()
    api.app = create_app(FakeDirectory(clients), HttpMetrics(CollectorRegistry()))
    models = (await api.request("GET", "/status")).json()["models"]
    assert models["down"] == {"is_ready": False, "deployment": dataclasses.asdict(deployment), "replicas": {}}
    assert models["busy"]["deployment"] is None
    assert models["busy"]["is_ready"]
    as_sent = json.loads(json.dumps(status.to_dict()))
    assert models["busy"]["replicas"] == dict.fromkeys(("a", "b"), as_sent)
    assert models["busy"]["replicas"]["a"]["state"]["num_running"] == 1
    assert models["busy"]["replicas"]["a"]["graphs"]["capture_sizes"] == [1, 2]


async def test_version_is_the_distribution_s() -> None:
    api = make_api()
    assert (await api.request("GET", "/version")).json() == {"version": api.app.version}


@pytest.mark.parametrize("path", ["/v2/completions", "/", "/v1/completions/"])
async def test_an_unknown_url_has_the_error_body(path: str) -> None:
    response = await make_api().request("GET", path)
    assert response.status_code == 404
    assert error_of(response) == {
        "message": f"Unknown URL GET {path}; /docs lists those there are.",
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_url",
    }


async def test_a_wrong_method_has_the_error_body() -> None:
    response = await make_api().request("GET", "/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response)["message"] == "/v1/completions does not take GET; use POST."
    assert error_of(response)["code"] == "method_not_allowed"


async def test_the_request_id_comes_back_or_is_made() -> None:
    api = make_api()
    given = await api.request("GET", "/version", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    first, second = [(await api.completion()).headers["x-request-id"] for _ in range(2)]
    assert first != second
    refused = await api.request("GET", "/nowhere", headers={"X-Request-Id": "abc-2"})
    assert refused.headers["x-request-id"] == "abc-2"


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129, "a\x7fb"])
async def test_a_bad_request_id_is_refused(request_id: str) -> None:
    response = await make_api().request("GET", "/version", headers={"X-Request-Id": request_id})
    assert response.status_code == 400
    assert error_of(response)["param"] == "X-Request-Id"


async def test_concurrent_requests_with_one_request_id_have_engine_ids_of_their_own() -> None:
    api = make_api()
    await asyncio.gather(*[api.completion(n=2) for _ in range(4)])
    assert len({request.request_id for request in api.model.requests}) == 8


async def test_metrics_count_requests_tokens_and_times() -> None:
    api = make_api(answer("a", "b", "c"))
    await api.completion(n=2)
    await api.chat(stream=True)
    await api.completion(temperature="hot")
    await api.request("GET", "/nowhere")
    await api.request("BREW", "/version")
    assert api.metric("warmgraph_http_requests_total", method="other", endpoint="/version", status="405") == 1
    assert api.metric("warmgraph_http_requests_total", method="POST", endpoint="/v1/completions", status="200") == 1
    assert api.metric("warmgraph_http_requests_total", method="POST", endpoint="/v1/completions", status="400") == 1
    assert api.metric("warmgraph_http_requests_total", method="GET", endpoint="unmatched", status="404") == 1
    assert api.metric("warmgraph_http_requests_in_flight") == 0
    assert api.metric("warmgraph_generation_tokens_total", model_name="fake") == 9
    assert api.metric("warmgraph_time_to_first_token_seconds_count", model_name="fake") == 3
    assert api.metric("warmgraph_inter_token_latency_seconds_count", model_name="fake") == 6
    assert api.metric("warmgraph_e2e_request_latency_seconds_count", model_name="fake") == 3
    assert api.metric("warmgraph_request_success_total", model_name="fake", finished_reason="stop") == 3
    chat_prompt = len("<user>Hi<assistant>")
    assert api.metric("warmgraph_prompt_tokens_total", model_name="fake") == len("Hi") + 1 + chat_prompt


async def test_metrics_do_not_count_refused_requests_as_failed() -> None:
    api = make_api(lambda request: [QueueFullError("full")])
    await api.completion()
    assert api.metric("warmgraph_request_success_total", model_name="fake", finished_reason="error") == 0
    assert api.metric("warmgraph_prompt_tokens_total", model_name="fake") == 0


async def test_metrics_are_exported_by_the_callable_or_by_default_from_the_registry() -> None:
    api = make_api()
    await api.completion()
    response = await api.request("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "warmgraph_generation_tokens_total" in response.text

    async def export() -> tuple[bytes, str]:
        return b"up 1\n", "text/plain; version=0.0.4"

    api.app = create_app(FakeDirectory([]), HttpMetrics(CollectorRegistry()), export_metrics=export)
    response = await api.request("GET", "/metrics")
    assert (response.content, response.headers["content-type"]) == (b"up 1\n", "text/plain; version=0.0.4")


async def test_the_documentation_page_is_served() -> None:
    response = await make_api().request("GET", "/docs")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")


async def test_the_openapi_document_describes_bodies_responses_and_resolves() -> None:
    document = (await make_api().request("GET", "/openapi.json")).json()
    schemas = document["components"]["schemas"]
    chat = document["paths"]["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert body == "#/components/schemas/ChatCompletionRequest"
    assert "tool_choice" in chat["requestBody"]["description"]
    assert "temperature" in schemas["ChatCompletionRequest"]["properties"]
    prompt_types = [option["type"] for option in schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]]
    assert prompt_types == ["string", "array", "array", "array"]
    assert set(chat["responses"]) == {"200", *(str(s) for s in (400, 401, 404, 413, 415, 429, 500, 503, 504))}
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    assert "application/json" in chat["responses"]["200"]["content"]
    assert all(
        "422" not in operation["responses"] for path in document["paths"].values() for operation in path.values()
    )
    references = _references(document)
    assert references
    assert all(reference.removeprefix("#/components/schemas/") in schemas for reference in references)


def _references(node: object) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(_references, node.values()))
    if isinstance(node, list):
        return set().union(*map(_references, node))
    return set()
